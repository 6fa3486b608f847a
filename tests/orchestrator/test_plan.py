"""Laws of the plan: it is arithmetic, it agrees with what training then does, and it leaves nothing behind."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli import BAD_INPUT, DONE, main
from orchestrator.plan import PhasePlan, derive_plan, scheduled_checkpoints, steps_per_epoch
from trainers.budget import evaluation_interval, phase_steps
from trainers.config import BudgetConfig, CheckpointConfig, EvaluationConfig, OptimConfig, RunConfig
from trainers.config_io import override
from trainers.errors import ConfigError, DataError
from trainers.memory.words import optimizer_values
from trainers.presets import PRESETS

TINY = PRESETS["fundamentallm/tiny"]()


# ---- the budget -------------------------------------------------------------------------------------------


@given(st.integers(1, 10**9), st.integers(1, 10**6))
def test_tokens_are_paid_for_in_whole_steps(tokens: int, tokens_per_step: int) -> None:
    steps = phase_steps(BudgetConfig(tokens=tokens), tokens_per_step=tokens_per_step, steps_per_epoch=None)
    assert (steps - 1) * tokens_per_step < tokens <= steps * tokens_per_step


@given(st.integers(1, 1000), st.integers(1, 10**6))
def test_whole_epochs_are_exact_and_there_is_always_a_step(epochs: int, length: int) -> None:
    assert phase_steps(BudgetConfig(epochs=epochs), tokens_per_step=1, steps_per_epoch=length) == epochs * length
    assert phase_steps(BudgetConfig(epochs=1e-9), tokens_per_step=1, steps_per_epoch=length) == 1


def test_steps_are_themselves_whatever_the_text() -> None:
    for length in (None, 1, 10**9):
        assert phase_steps(BudgetConfig(steps=7), tokens_per_step=3, steps_per_epoch=length) == 7


def test_epochs_of_a_stream_are_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"budget\.steps or budget\.tokens"):
        phase_steps(BudgetConfig(epochs=2), tokens_per_step=512, steps_per_epoch=None)


def test_the_interval_of_evaluations() -> None:
    assert evaluation_interval(EvaluationConfig(every_steps=5, every_epochs=None), 100) == 5
    assert evaluation_interval(EvaluationConfig(every_epochs=0.5), 100) == 50
    assert evaluation_interval(EvaluationConfig(every_epochs=0.5), None) is None
    assert evaluation_interval(EvaluationConfig(every_epochs=None), 100) is None


# ---- checkpoints ----------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 60), st.one_of(st.none(), st.integers(1, 25))), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(1, 40)),
    st.one_of(st.none(), st.sampled_from([0.5, 1.0, 1.5, 3.0])),
)
def test_scheduled_checkpoints_are_the_distinct_steps_of_the_loop(
    phases: list[tuple[int, int | None]], every: int | None, epochs: float | None
) -> None:
    saved, step = set(), 0
    for steps, length in phases:  # the loop's own rule, spelt out
        for inside in range(1, steps + 1):
            step += 1
            by_epochs = epochs and length and inside % max(1, math.floor(epochs * length)) == 0
            if inside == steps or (every and step % every == 0) or by_epochs:
                saved.add(step)
    plans = [PhasePlan("", steps, 0, None, length, 0) for steps, length in phases]
    saving = CheckpointConfig(every_steps=every, every_epochs=epochs)
    assert scheduled_checkpoints(plans, saving) == len(saved)


def test_a_save_at_each_epoch_is_counted_and_said(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saving = ["every_epochs=1", "every_minutes=null", "save_best=false", "every_steps=null"]
    arguments = ["plan", "fundamentallm/tiny", "--data", "text.txt", "budget.epochs=4"]
    arguments += [f"checkpoint.{one}" for one in saving]
    assert main([*arguments, "--json"]) == DONE
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["scheduled_checkpoints"], plan["kept_checkpoints"]) == (4, 3)
    assert main(arguments) == DONE
    assert "every epoch" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("optim", "values"),
    [
        (OptimConfig(name="adamw"), 2),
        (OptimConfig(name="adam"), 2),
        (OptimConfig(name="sgd", momentum=0.9), 1),
        (OptimConfig(name="sgd", momentum=0.0), 0),
        (OptimConfig(name="rmsprop", momentum=0.0), 1),
        (OptimConfig(name="rmsprop", momentum=0.5), 2),
    ],
)
def test_optimizer_state_is_counted_as_torch_keeps_it(optim: OptimConfig, values: int) -> None:
    import torch

    from trainers.config import PrecisionConfig
    from trainers.engine import TorchEngine

    assert optimizer_values(optim) == values
    model = torch.nn.Linear(8, 8)
    engine = TorchEngine(
        model,
        optim=optim,
        precision=PrecisionConfig(),
        device=torch.device("cpu"),
        world_size=1,
        compile=False,
        deterministic=False,
    )
    with engine.micro_batch(last=True) as module:
        engine.backward(module(torch.ones(1, 8)).sum())
    engine.update(0.1)
    kept = sum(t.numel() for t in engine.tensors()["optimizer"].values() if t.numel() > 1)
    assert kept == values * sum(parameter.numel() for parameter in model.parameters())


# ---- the whole run ------------------------------------------------------------------------------------------------


def test_a_plan_adds_up() -> None:
    config = PRESETS["fundamentallm/two-phase"]()
    plan = derive_plan(config, parameters=1000, steps_per_epoch=[3000, 5000])
    assert plan.total_steps == sum(phase.steps for phase in plan.phases)
    assert plan.total_tokens == plan.total_steps * config.tokens_per_step
    assert plan.checkpoint_bytes == plan.snapshot_bytes == 1000 * 4 * 3
    assert plan.disk_bytes == (plan.kept_checkpoints + 1) * plan.checkpoint_bytes
    assert plan.kept_checkpoints == config.checkpoint.keep_last_n + 1


def test_few_checkpoints_are_not_counted_as_many() -> None:
    config = override(
        TINY,
        [
            "budget.steps=4",
            "checkpoint.every_minutes=null",
            "checkpoint.every_steps=null",
            "checkpoint.save_best=false",
        ],
    )
    assert derive_plan(config, parameters=10, steps_per_epoch=[4]).kept_checkpoints == 1


def test_a_text_without_a_whole_step_is_refused() -> None:
    with pytest.raises(DataError, match="shorter than one step"):
        derive_plan(TINY, parameters=1, steps_per_epoch=[0])


@dataclass(frozen=True)
class Packed:
    tokens: np.ndarray


@pytest.mark.parametrize("n_tokens", [1, 33, 400, 5_000, 12_345])
def test_an_epoch_is_as_long_as_the_loader_says(n_tokens: int) -> None:
    from trainers.data.loader import build_loader
    from trainers.data.types import PhaseData

    tokens = np.arange(n_tokens, dtype=np.uint16)
    planned = steps_per_epoch(TINY, [n_tokens])
    data = PhaseData((Packed(tokens),), None, Packed(tokens))  # type: ignore[arg-type]
    phase = TINY.resolved_phases()[0]
    if planned == 0:
        with pytest.raises(DataError):
            build_loader(TINY, phase, data, 0, 1)
    else:
        assert build_loader(TINY, phase, data, 0, 1).steps_per_epoch == planned
    assert steps_per_epoch(TINY, [n_tokens, None]) is None


# ---- the verb ------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORCHESTRATE_RUNS", raising=False)
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(1500)))
    return path


def everything(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("verb", [["plan"], ["train", "--dry-run"]], ids=" ".join)
def test_a_plan_leaves_nothing_behind(verb: list[str], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(text.parent)
    assert main([*verb, "fundamentallm/tiny", "--data", "text.txt"]) == DONE
    assert everything(text.parent) == before
    assert "parameters" in capsys.readouterr().out


def test_the_plan_is_what_training_does(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters, vocabulary, tokens and steps against the prepared data and the real model."""
    from orchestrator.plan import plan_run
    from trainers.data.prepare import prepare

    arguments = ["fundamentallm/tiny", "--data", "text.txt", "budget.epochs=2"]
    assert main(["plan", *arguments, "--json"]) == DONE
    said = json.loads(capsys.readouterr().out)
    config = RunConfig.model_validate(said["config"])
    prepared = prepare(config, text.parent / "cache")
    true = plan_run(config, prepared)
    assert said["exact"] is True
    assert said["plan"] == json.loads(json.dumps(true.to_json()))
    assert said["vocab_size"] == prepared.tokenizer.vocab_size
    other = RunConfig.model_validate(said["config"] | {"budget": {"epochs": 1}})
    assert plan_run(other, prepared) != true, "a plan that cannot differ proves nothing"


def test_steps_follow_from_tokens(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "fundamentallm/tiny", "--data", "text.txt", "budget.tokens=10000", "--json"]) == DONE
    said = json.loads(capsys.readouterr().out)
    config = RunConfig.model_validate(said["config"])
    assert said["plan"]["total_steps"] == math.ceil(10_000 / config.tokens_per_step)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--precision", "fp16", "--device", "cpu"], "fp16"),
        (["--runs-dir", "text.txt/runs"], "--runs-dir"),
        (["batch.sequences=1000000"], "batch.sequences"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["model.vocab_size=3"], "model.vocab_size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_plan_refuses_what_training_would(
    arguments: list[str], expected: str, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if "--data" in arguments else ["--data", "text.txt"]
    assert main(["plan", "fundamentallm/tiny", *data, *arguments]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == "" and expected in err and "Traceback" not in err
