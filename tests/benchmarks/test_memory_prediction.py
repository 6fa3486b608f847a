"""What the benchmark of the planner says of a plan: its whole command, against its bars."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import memory_prediction
from benchmarks.memory_prediction import PLAN_GIB, PLAN_S, PLANNED, Seen, plan_figures, prediction_figures
from trainers.presets import PRESETS

GIB = 1 << 30


def test_a_plan_is_weighed_and_timed_from_the_command_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(PLANNED) <= set(PRESETS)
    monkeypatch.setattr(memory_prediction, "PLANNED", ("fundamentallm/tiny",))
    seconds, gib = plan_figures(tmp_path, 1)
    assert (seconds.bar, gib.bar) == (PLAN_S, PLAN_GIB) == (5.0, 2.0)
    assert seconds.value > 0.5 and 0.1 < gib.value < PLAN_GIB  # torch is imported, and no model allocated
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]  # a plan leaves nothing behind
    monkeypatch.setattr(memory_prediction, "PLANNED", ("fundamentallm/none",))
    with pytest.raises(AssertionError, match="exit code 2"):
        plan_figures(tmp_path, 1)


def test_a_cell_is_judged_with_the_constant_of_the_others_and_only_where_it_is_large() -> None:
    calibrating = [Seen(f"c{extra}", 0, 2 * GIB + extra, 2 * GIB, "training") for extra in (1 << 20, 9 << 20, 5 << 20)]
    judged = [Seen("off", 0, 2 * GIB, 3 * GIB, "training"), Seen("small", 0, GIB // 2, GIB, "training")]
    constant, off, small = prediction_figures(calibrating, judged)
    assert constant.value == 5.0
    assert off.value == pytest.approx(0.5 + (5 << 20) / (2 * GIB)) and off.verdict == "MISSED"
    assert small.value > 0.9 and small.verdict == ""
