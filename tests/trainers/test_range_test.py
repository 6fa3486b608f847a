"""The range test: it leaves a live run as it found it, gives the same bits again, and suggests rates that hold."""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.trainers.attempts import NoisyMemory
from tests.trainers.small_runs import config_for, stateful, write_text
from trainers.config import RunConfig
from trainers.errors import ConfigError, TrainingFailed
from trainers.loop import Builder, forward_backward
from trainers.lr_curve import DIVERGENCE, FEWEST_POINTS, LrCurve, NoSuggestion, geometric, smoothing_window, suggest
from trainers.models import build_model
from trainers.phase import ActivePhase
from trainers.range_test import Losses, own_loader, range_test, sweep
from trainers.run import Run
from trainers.scratch import scratch_run
from trainers.seeds import rng_tensors

LRS = geometric(1e-4, 1.0, 10)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


# ---- as it was found ------------------------------------------------------------------------------------


def bits(run: Run) -> dict[str, bytes]:
    """Everything that decides how a run goes on, byte for byte (NaN equals NaN)."""
    tensors = {
        f"{file}/{name}": tensor for file, named in run.engine.tensors().items() for name, tensor in named.items()
    }
    tensors |= rng_tensors() | run.streams.tensors()
    found = {name: tensor.detach().cpu().contiguous().numpy().tobytes() for name, tensor in tensors.items()}
    rates = [group["lr"] for group in run.engine.optimizer.param_groups]
    gradients = [parameter.grad is None for parameter in run.model.parameters()]
    rest = (run.progress.to_json(), run.engine.state(), rates, gradients, run.model.training)
    return found | {"the rest": repr(rest).encode()}


def train(run: Run, phase: ActivePhase, steps: int) -> list[float]:
    """As run_phase does, without what goes to the disk."""
    losses = []
    for _ in range(steps):
        batches = phase.loader.micro_batches(run.progress.phase_step)
        targets = sum(batch.n_targets for batch in batches)
        losses.append(forward_backward(run, phase, batches, targets).item())
        run.engine.update(phase.lr(run.progress.phase_step))
        run.progress.advance(targets)
    return losses


def interrupted(run: Run, phase: ActivePhase, between: Callable[[Run, ActivePhase], object]) -> tuple[object, ...]:
    """Three steps, `between`, three steps: the state on both sides of it, at the end, and every loss."""
    losses = train(run, phase, 3)
    before = bits(run)
    between(run, phase)
    after = bits(run)
    losses += train(run, phase, 3)
    return before, after, bits(run), losses


def noisy_memory(text: Path) -> tuple[RunConfig, Builder]:
    return stateful(text), NoisyMemory


def gpt(text: Path) -> tuple[RunConfig, Builder]:
    return config_for(text), build_model


def undamped(run: Run, phase: ActivePhase) -> None:
    with own_loader(run, phase) as loader:
        sweep(run, phase, loader, LRS, lambda step, lr, loss: None)


@pytest.mark.parametrize("kind", [gpt, noisy_memory])
def test_a_live_run_goes_on_as_if_nothing_had_been(
    kind: Callable[[Path], tuple[RunConfig, Builder]], text: Path, tmp_path: Path
) -> None:
    config, build = kind(text)
    with scratch_run(config, tmp_path, build=build) as (run, phase):
        _, _, undisturbed, losses = interrupted(run, phase, lambda run, phase: None)
    with scratch_run(config, tmp_path, build=build) as (run, phase):
        before, after, end, told = interrupted(run, phase, lambda run, phase: range_test(run, phase, LRS))
    assert before == after and end == undisturbed and told == losses
    with scratch_run(config, tmp_path, build=build) as (run, phase):  # the control: the sweep alone
        before, after, end, told = interrupted(run, phase, undamped)
    assert before != after and end != undisturbed and told != losses


def test_whatever_ends_the_test_the_run_is_restored(text: Path, tmp_path: Path) -> None:
    def stop(step: int, lr: float, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with scratch_run(config_for(text), tmp_path) as (run, phase):
        before = bits(run)
        with pytest.raises(KeyboardInterrupt):
            range_test(run, phase, LRS, on_step=stop)
        assert bits(run) == before


def test_a_request_to_stop_ends_it(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch_run(config_for(text), tmp_path) as (run, phase):
        asked = iter([None, None, None, "SIGTERM"])
        monkeypatch.setattr(run.ctx, "should_stop", lambda: next(asked))
        curve = range_test(run, phase, LRS)
    assert (curve.ended, curve.why, len(curve.losses)) == ("stopped", "SIGTERM", 2)


def test_a_scratch_run_leaves_only_the_cache(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with scratch_run(config_for(text), tmp_path / "cache") as (run, phase):
        train(run, phase, 1)
        assert list(scratch.iterdir()) != []
    assert list(scratch.iterdir()) == [] and {path.name for path in tmp_path.iterdir()} == {"tmp", "cache"}


# ---- the curve ------------------------------------------------------------------------------------------


def curve_of(config: RunConfig, cache: Path, lrs: tuple[float, ...], build: Builder = build_model) -> LrCurve:
    with scratch_run(config, cache, build=build) as (run, phase):
        return range_test(run, phase, lrs)


def test_the_same_seed_gives_the_same_curve(text: Path, tmp_path: Path) -> None:
    with scratch_run(config_for(text), tmp_path) as (run, phase):
        once, again = range_test(run, phase, LRS), range_test(run, phase, LRS)
    assert once == again == curve_of(config_for(text), tmp_path, LRS)
    assert once != curve_of(config_for(text, seed=43), tmp_path, LRS)


def test_the_losses_are_those_of_the_steps_themselves(text: Path, tmp_path: Path) -> None:
    """At a rate that does not move, the test is the training loop one batch on."""
    config = config_for(text, schedule={"kind": "constant"})
    flat = (config.optim.lr,) * 10
    curve = curve_of(config, tmp_path, flat)
    with scratch_run(config, tmp_path) as (run, phase):
        losses = [total / config.tokens_per_step for total in train(run, phase, 11)]
    assert [curve.first_loss, *curve.losses] == losses
    assert list(curve.losses) != losses[:-1]  # the control: not the losses before the updates


def test_what_a_real_model_suggests_lies_below_its_divergence(text: Path, tmp_path: Path) -> None:
    config = config_for(text, optim={"clip_norm": None}, model={**config_for(text).model.model_dump(), "dropout": 0.0})
    curve = curve_of(config, tmp_path, geometric(1e-5, 1e4, 60))
    found = suggest(curve)
    assert curve.ended in ("diverged", "nonfinite") and curve.ended_at is not None and len(curve.losses) < 60
    assert found.band[0] < found.suggested < found.minimum < curve.ended_at and found.band[1] <= found.minimum
    assert not found.still_falling


def test_a_loss_that_is_never_finite_ends_well(text: Path, tmp_path: Path) -> None:
    def broken(config: object, vocab_size: int) -> nn.Module:
        model = build_model(config_for(text).model, vocab_size)
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        return model

    with scratch_run(config_for(text), tmp_path, build=broken) as (run, phase):
        before = bits(run)
        curve = range_test(run, phase, LRS)
        assert bits(run) == before
    assert (curve.losses, curve.ended, curve.ended_at) == ((), "nonfinite", None) and math.isnan(curve.first_loss)
    with pytest.raises(NoSuggestion, match="before the first update"):
        suggest(curve)


def test_a_sweep_that_begins_too_high_says_where_to_begin(text: Path, tmp_path: Path) -> None:
    curve = curve_of(config_for(text, optim={"clip_norm": None}), tmp_path, geometric(1e6, 1e9, 20))
    assert curve.ended in ("diverged", "nonfinite") and curve.ended_at == pytest.approx(1e6, rel=10)
    with pytest.raises(NoSuggestion, match="--from") as told:
        suggest(curve)
    assert isinstance(told.value, TrainingFailed)


# ---- reading it -------------------------------------------------------------------------------------------


def descent(curvatures: list[float], start: float, lrs: tuple[float, ...]) -> LrCurve:
    """Plain gradient descent on a quadratic, which diverges for rates above 2 / the largest curvature."""
    losses = Losses(smoothing_window(len(lrs)))
    bend, weights = np.array(curvatures), np.full(len(curvatures), start)
    losses.take(float(0.5 * bend @ weights**2) + 1.0)
    for lr in lrs:
        weights = weights - lr * bend * weights
        ended = losses.take(float(0.5 * bend @ weights**2) + 1.0)
        if ended:
            return losses.curve(lrs, ended, lr)
    return losses.curve(lrs, "completed", None)


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6), st.floats(1.0, 30.0), st.integers(40, 200))
def test_on_a_quadratic_every_rate_is_stable(curvatures: list[float], start: float, steps: int) -> None:
    curve = descent(curvatures, start, geometric(1e-6 / max(curvatures), 1e4 / min(curvatures), steps))
    assert curve.ended == "diverged" and curve.ended_at is not None
    try:
        found = suggest(curve)
    except NoSuggestion:  # so gentle a slope that the loss hardly falls
        assert curve.first_loss - min(curve.losses) < 0.1 * curve.first_loss
        return
    assert found.suggested < 2 / max(curvatures) < curve.ended_at
    assert found.band[0] < found.suggested <= found.band[1] <= found.minimum < curve.ended_at


def drawn(losses: list[float], lrs: tuple[float, ...]) -> LrCurve:
    return LrCurve(lrs, tuple(losses), losses[0], smoothing_window(len(lrs)), "completed")


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_suggests_nothing(seed: int) -> None:
    rng, lrs = random.Random(seed), geometric(1e-6, 1.0, 120)
    noise = [4.0 + rng.gauss(0, 0.2) for _ in lrs]
    with pytest.raises(NoSuggestion, match="did not fall"):
        suggest(drawn(noise, lrs))
    falling = [loss - 2.0 * min(1.0, 1e3 * lr) for loss, lr in zip(noise, lrs, strict=True)]  # the control
    found = suggest(drawn(falling, lrs))
    assert 1e-5 < found.steepest < 1e-2 and found.minimum_tenth == found.minimum / 10


def test_a_loss_that_still_falls_at_the_end_is_told() -> None:
    lrs = geometric(1e-6, 1e-2, 100)
    falling = drawn([4.0 - 0.01 * index for index in range(100)], lrs)
    assert suggest(falling).still_falling
    turned = drawn([4.0 - 0.01 * min(index, 140 - index) for index in range(100)], lrs)
    assert not suggest(turned).still_falling


def test_the_smoothed_loss_does_not_lag() -> None:
    lrs = geometric(1e-4, 1.0, 101)
    valley = drawn([abs(index - 50) / 10 for index in range(101)], lrs)
    assert int(np.argmin(valley.smoothed)) == 50 and len(valley.smoothed) == 101
    straight = drawn([4.0 - 0.01 * index for index in range(101)], lrs)
    assert straight.smoothed == pytest.approx(straight.losses)


def test_divergence_is_measured_against_the_lowest_smoothed_loss() -> None:
    losses = Losses(5)
    assert [losses.take(value) for value in (4.0, 2.0, 2.0, 7.9)] == [None] * 4
    assert losses.take(DIVERGENCE * 2.0 + 0.1) == "diverged"
    assert Losses(5).take(math.inf) == "nonfinite"


@pytest.mark.parametrize(
    ("low", "high", "steps", "said"),
    [
        (1.0, 1e-6, 100, "Did you mean --from 1e-06 --to 1"),
        (1e-3, 1e-3, 100, "--from 0.001 --to 0.001"),
        (0.0, 1.0, 100, "above 0"),
        (-1.0, 1.0, 100, "above 0"),
        (math.nan, 1.0, 100, "above 0"),
        (1e-6, math.inf, 100, "larger one"),
        (1e-6, 1.0, 0, "--steps 0"),
        (1e-6, 1.0, FEWEST_POINTS - 1, "at least"),
    ],
)
def test_bounds_that_make_no_sweep_are_refused(low: float, high: float, steps: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        geometric(low, high, steps)


def test_the_sweep_is_geometric() -> None:
    lrs = np.array(geometric(1e-6, 10.0, 50))
    assert lrs[0] == 1e-6 and lrs[-1] == pytest.approx(10.0) and len(lrs) == 50
    assert lrs[1:] / lrs[:-1] == pytest.approx(np.full(49, lrs[1] / lrs[0]))


def test_a_curve_is_written_whole() -> None:
    curve = drawn([3.0] * 10, geometric(1e-3, 1.0, 10))
    written = curve.to_json()
    assert LrCurve(**{field.name: written[field.name] for field in dataclasses.fields(LrCurve)}) == curve
    assert len(written["smoothed"]) == 10
