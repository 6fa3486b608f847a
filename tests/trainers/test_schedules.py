"""Learning rates: warm-up values, endpoints, and which budgets may grow."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.config import ScheduleConfig
from trainers.errors import ConfigError
from trainers.schedules import budget_can_grow, endless_warmup, lr_at

KINDS = ("constant", "linear", "cosine", "step", "inverse_sqrt", "wsd")
LR = 3e-4


def curve(total: int, *, steps_per_epoch: int | None = 10, **schedule: object) -> list[float]:
    config = ScheduleConfig.model_validate(schedule)
    return [lr_at(config, s, total_steps=total, base_lr=LR, steps_per_epoch=steps_per_epoch) for s in range(total)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_kth_update_of_the_warm_up_has_k_over_warmup(kind: str) -> None:
    rates = curve(200, kind=kind, warmup_steps=40)
    assert rates[:40] == pytest.approx([LR * k / 40 for k in range(1, 41)], rel=1e-15)
    assert rates[0] > 0  # the first update is not wasted
    assert rates[39] == rates[40] == LR  # the shape starts at the full rate


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_update_has_the_full_rate(kind: str) -> None:
    assert curve(50, kind=kind)[0] == LR


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_decays_end_at_the_floor_with_the_last_update(kind: str, warmup: int) -> None:
    rates = curve(100, kind=kind, warmup_steps=warmup, min_lr_ratio=0.1)
    assert rates[-1] == pytest.approx(0.1 * LR, rel=1e-12)
    assert min(rates[warmup:]) == rates[-1] and rates[-2] > rates[-1]
    beyond = ScheduleConfig(kind=kind, warmup_steps=warmup)  # type: ignore[arg-type]
    assert lr_at(beyond, 500, total_steps=100, base_lr=LR, steps_per_epoch=None) == pytest.approx(0.1 * LR)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert curve(101, kind="cosine", min_lr_ratio=0.2)[50] == pytest.approx(LR * 0.6)


def test_linear_falls_by_equal_amounts() -> None:
    rates = curve(11, kind="linear", min_lr_ratio=0.0)
    assert rates == pytest.approx([LR * (1 - k / 10) for k in range(11)], abs=1e-18)


def test_step_halves_at_each_interval_down_to_the_floor() -> None:
    rates = curve(100, kind="step", step_size=3, step_unit="epochs", gamma=0.5, min_lr_ratio=0.2)
    assert [rates[s] / LR for s in (0, 29, 30, 59, 60, 89, 90)] == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25, 0.2])
    by_steps = curve(
        100, kind="step", step_size=30, step_unit="steps", gamma=0.5, min_lr_ratio=0.2, steps_per_epoch=None
    )
    assert by_steps == rates


def test_inverse_sqrt_quarters_the_time_doubles_the_rate() -> None:
    rates = curve(401, kind="inverse_sqrt", warmup_steps=100)
    assert rates[400] == pytest.approx(LR / 2)


def test_wsd_is_flat_until_its_decay() -> None:
    rates = curve(100, kind="wsd", warmup_steps=10, decay_fraction=0.2, min_lr_ratio=0.0)
    assert set(rates[10:80]) == {LR}
    assert rates[80:] == pytest.approx([LR * (1 - k / 20) for k in range(1, 21)], abs=1e-18)


def test_epochs_of_a_stream_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="step_unit=steps"):
        curve(10, kind="step", steps_per_epoch=None)


@given(
    kind=st.sampled_from(KINDS),
    warmup=st.integers(0, 30),
    total=st.integers(1, 60),
    floor=st.floats(0, 1),
    step=st.integers(0, 100),
)
def test_every_rate_lies_between_zero_and_the_base(kind: str, warmup: int, total: int, floor: float, step: int) -> None:
    config = ScheduleConfig(kind=kind, warmup_steps=warmup, min_lr_ratio=floor)  # type: ignore[arg-type]
    rate = lr_at(config, step, total_steps=total, base_lr=LR, steps_per_epoch=4)
    assert 0 <= rate <= LR * (1 + 1e-12) and math.isfinite(rate)


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_may_grow_exactly_where_the_curve_so_far_stays(kind: str) -> None:
    allowed, reason = budget_can_grow(ScheduleConfig(kind=kind))  # type: ignore[arg-type]
    unchanged = curve(100, kind=kind, warmup_steps=5) == curve(160, kind=kind, warmup_steps=5)[:100]
    assert allowed == unchanged
    assert bool(reason) == (not allowed) and (allowed or kind in reason)


@given(st.integers(0, 300), st.integers(1, 300))
def test_a_warm_up_that_never_ends_is_told_and_no_other(warmup_steps: int, total: int) -> None:
    note = endless_warmup(ScheduleConfig(kind="constant", warmup_steps=warmup_steps), total)
    assert (note is None) is (max(curve(total, kind="constant", warmup_steps=warmup_steps)) == LR)
