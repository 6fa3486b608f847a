"""Laws of a sweep's figures: they can be drawn of anything a sweep can be, and show what the results say."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest

from orchestrator.sweeps.axes import searched_axes, text_of
from orchestrator.sweeps.figures import draw_search_figures, log_ticks, robust_limits
from orchestrator.sweeps.figures_course import best_so_far
from orchestrator.sweeps.importance import ENOUGH, FEWEST, importance
from orchestrator.sweeps.results import PointResult, SweepResults
from orchestrator.sweeps.settings import Objective
from search_spaces.domains import Choice, Float
from search_spaces.space import Axis, Space
from tests.orchestrator.sweep_examples import example, point, sweep

BEST_IS_MOST = Objective(metric="val/accuracy", mode="max")
ALL = ["learning_rate", "parallel_coordinates", "importance", "rungs", "trade_off", "best_so_far"]


def failed(number: int, **params: object) -> PointResult:
    return point(number, {"optim.lr": 10.0**-number, **params}, state="nonfinite")


CASES = {
    "three seeds, two precisions": (lambda: example(24, seeds=3), ALL),
    "one trial": (lambda: sweep([point(0, {"optim.lr": 1e-3})]), ALL),
    "all failed": (
        lambda: sweep([failed(n, strange={1: "<b>$x_1$", 2: "\x1b[31m"}.get(n, n)) for n in range(1, 5)]),
        ["learning_rate", "parallel_coordinates", "importance", "rungs", "best_so_far"],
    ),
    "nothing begun": (lambda: sweep([], state="running"), []),
    "no learning rate, a list, an axis not everywhere": (
        lambda: sweep([point(0, {"optim.betas": [0.9, 0.95]}), point(1, {"optim.betas": [0.9, 0.99], "x": True})]),
        ["parallel_coordinates", "importance", "rungs", "trade_off", "best_so_far"],
    ),
    "more is better": (lambda: sweep(list(example(9).points), objectives=(BEST_IS_MOST,)), ALL),
    "still running": (lambda: sweep([point(n, {"optim.lr": 1e-3 * 2**n}, state="running") for n in range(3)]), None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_any_sweep_can_be_drawn(name: str, tmp_path: Path) -> None:
    make, expected = CASES[name]
    files = draw_search_figures(make(), tmp_path / "figures")
    if expected is not None:
        assert [path.stem for path in files] == expected
    assert sorted(files) == sorted((tmp_path / "figures").glob("*") if files else [])
    for path in files:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", data[16:24])
        assert 600 <= width <= 3000 and 200 <= height <= 1200


def test_lone_bad_values_do_not_stretch_the_limits_but_a_wide_spread_does() -> None:
    values = [2.0, 2.1, 2.2, 2.3, 2.4]
    low, high = robust_limits([*values, 1e4], 1.0)
    assert low < 2.0 and 2.4 < high < 3.0
    assert robust_limits([*values, 2.6], 1.0)[1] > 2.6
    low, high = robust_limits([*values, -1e4], -1.0)  # more is better: the bad ones lie below
    assert 1.0 < low < 2.0 and high > 2.4


@pytest.mark.parametrize(("low", "high"), [(1e-5, 1e-1), (1e-4, 3e-4), (0.001, 0.00102), (3.0, 3.0), (7e-7, 5e8)])
def test_ticks_of_a_logarithmic_axis_lie_inside_it(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert ticks == sorted(set(ticks)) and all(low <= tick <= high for tick in ticks)


def test_the_axes_follow_the_space_where_the_settings_have_it() -> None:
    space = Space((Axis("optim.lr", Float(1e-4, 1e-1)), Axis("precision", Choice(("fp32", "bf16")))))
    points = [point(n, {"optim.lr": 10.0 ** -(n + 1), "precision": ("bf16", "fp32")[n % 2]}) for n in range(3)]
    lr, precision = searched_axes(sweep(points, settings={"space": space.to_json()}))
    assert lr.numeric and not lr.log and precision.categories == ("fp32", "bf16")
    lr, precision = searched_axes(sweep(points, settings={"space": "torn"}))
    assert lr.log and precision.categories == ("bf16", "fp32")
    assert searched_axes(sweep(points[:1])) == ()


def test_the_best_so_far_counts_completed_trials_alone() -> None:
    points = [point(n, {"optim.lr": rate}) for n, rate in enumerate((1e-3, 2e-3, 5e-4))]
    points.insert(1, point(9, {"optim.lr": 2e-3}, state="asha"))
    steps = best_so_far(points, 1.0)
    means = [p.mean for p in points]
    assert steps == [(1, means[0]), (2, means[0]), (3, means[2]), (4, means[2])]
    assert best_so_far(points[1:2], 1.0) == []


# ---- importance -------------------------------------------------------------------------------------------------


def graded(count: int, **more: object) -> SweepResults:
    """Points whose value is their first parameter, whatever the second; the third is a category without a say."""
    points = []
    for number in range(count):
        params = {"model.dropout": number / count, "seed": (number * 7) % 5, "kind": "ab"[(number // 2) % 2]}
        made = point(number, params)
        value = 1.0 + params["model.dropout"]  # type: ignore[operator]
        points.append(PointResult(number, tuple(type(t)(**{**vars(t), "objectives": (value,)}) for t in made.trials)))
    return sweep(points, **more)


@pytest.mark.parametrize(("count", "method"), [(FEWEST, "Rank correlation"), (ENOUGH, "fANOVA")])
def test_what_decides_is_the_most_important(count: int, method: str) -> None:
    found = importance(graded(count))
    assert found.method.startswith(method) and str(count) in found.method
    assert found.shares[0][0] == "model.dropout" and found.shares[0][1] > 0.8
    assert all(0 <= share < 0.5 for _, share in found.shares[1:]) and len(found.shares) == 3
    assert found == importance(graded(count))  # seeded


def test_with_few_trials_or_equal_values_nothing_is_claimed() -> None:
    few = importance(graded(FEWEST - 1))
    assert few.shares == () and few.method.startswith("Too few trials")
    same = [point(n, {"optim.lr": 1e-3 * (n + 1)}, state="nonfinite") for n in range(30)]
    assert importance(sweep(same)).shares == ()


def test_failed_trials_are_left_out_of_the_importance_and_it_says_so() -> None:
    points = [*graded(FEWEST).points, point(99, {"model.dropout": 0.1, "seed": 1, "kind": "a"}, state="oom")]
    assert importance(sweep(points)).shares == importance(graded(FEWEST)).shares
    assert "1 failed left out" in importance(sweep(points)).method


def test_values_read_as_people_write_them() -> None:
    values = [0.001, 1e-5, 3, True, None, [0.9, 0.95], "bf16", 123456.0, math.pi]
    texts = ["0.001", "1e-5", "3", "true", "null", "[0.9, 0.95]", "bf16", "1.235e5", "3.142"]
    assert [text_of(value) for value in values] == texts
