"""Stochastic rounding: right on average, exact where nothing is to be rounded, and repeatable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.trainers import small_runs
from tests.trainers.crash import attempt, finished
from tests.trainers.small_runs import config_for
from trainers.config import OptimConfig, PrecisionConfig
from trainers.config_io import override
from trainers.manifest import newest
from trainers.optim import build_optimizer, parameter_groups
from trainers.rounding import round_stochastically

CPU = torch.device("cpu")
PURE = PrecisionConfig(compute="bf16", bf16_weights=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_mean_is_the_value_and_each_result_is_a_neighbour() -> None:
    value = 1.0 + 1 / 512  # a quarter of the way from 1 to the next bf16, 1 + 1/128
    values = torch.full((40_000,), value)
    rounded = round_stochastically(values, generator()).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 1 / 128}
    assert abs(float(rounded.double().mean()) - value) < 4 * (1 / 128) * (0.25 * 0.75 / 40_000) ** 0.5
    assert set(values.bfloat16().tolist()) == {1.0}  # the nearest would lose it


def test_what_bf16_holds_stays_and_signs_are_alike() -> None:
    held = torch.randn(1000, generator=generator()).bfloat16()
    assert torch.equal(round_stochastically(held.float(), generator()), held)
    values = torch.randn(1000, generator=generator(1))
    positive, negative = round_stochastically(values, generator()), round_stochastically(-values, generator())
    assert torch.equal(positive, -negative)


def weight_after(steps: int, *, pure: bool) -> float:
    """The mean of weights that start at 1 under a gradient that is always 1."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    if pure:
        model.to(torch.bfloat16)
    settings = OptimConfig(lr=1e-4, weight_decay=0.0)
    precision = PURE if pure else PrecisionConfig()
    optimizer = build_optimizer(parameter_groups(model, settings), settings, CPU, precision)
    for _ in range(steps):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    return float(model.weight.detach().double().mean())


def test_small_updates_of_bf16_weights_add_up() -> None:
    """Each is 1e-4, a fortieth of what the nearest rounding would notice."""
    exact = weight_after(40, pure=False)
    assert exact == pytest.approx(1 - 40e-4, abs=1e-5)
    assert weight_after(40, pure=True) == pytest.approx(exact, abs=2e-4)


def test_8_bit_state_goes_with_it() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Linear(64, 128).to(torch.bfloat16)
    settings = OptimConfig(lr=1e-2)
    precision = PURE.model_copy(update={"optimizer_state": "int8"})
    optimizer = build_optimizer(parameter_groups(model, settings), settings, CPU, precision)
    inputs = torch.randn(16, 64).bfloat16()
    losses = []
    for _ in range(10):
        loss = (model(inputs) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert optimizer.state[model.weight]["state1"].dtype == torch.uint8
    assert set(optimizer.state) == {model.weight, model.bias}  # nothing of the widened copies is left


def test_moments_are_kept_in_fp32() -> None:
    model = nn.Linear(8, 8).to(torch.bfloat16)
    settings = OptimConfig()
    optimizer = build_optimizer(parameter_groups(model, settings), settings, CPU, PURE)
    assert optimizer.state[model.weight]["exp_avg_sq"].dtype == torch.float32


def test_a_run_with_bf16_weights_starts_from_one_without_and_the_other_way_round(tmp_path: Path) -> None:
    config = config_for(small_runs.write_text(tmp_path), samples={"count": 0})
    pure = ["precision.compute=bf16", "precision.bf16_weights=true"]
    wide, narrow, again = tmp_path / "wide", tmp_path / "narrow", tmp_path / "again"
    first = finished(attempt(config, wide)).rows
    second = finished(attempt(override(config, [*pure, f"init_from={wide}"]), narrow)).rows
    third = finished(attempt(override(config, [f"init_from={narrow}"]), again)).rows
    kinds = {path: {t.dtype for t in newest(path / "checkpoints").load("model").values()} for path in (wide, narrow)}  # type: ignore[union-attr]
    assert kinds == {wide: {torch.float32}, narrow: {torch.bfloat16}}
    fresh, *begun = ([row["train/loss"] for row in rows if "train/loss" in row] for rows in (first, second, third))
    for losses in begun:  # each goes on where the one before stood, not where a new model stands
        assert losses[0] < (fresh[0] + fresh[-1]) / 2
