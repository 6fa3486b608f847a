"""Laws of a sweep whose time is used up: it stops at a step boundary, and with more time ends as it would have.

The driver's clock and the desk, with real trainings, without Tune and MLflow (inline_sweeps.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from orchestrator.signals import StopSignals
from orchestrator.sweeps.desk import TrialDesk
from orchestrator.sweeps.driver import SweepDriver
from orchestrator.sweeps.sweep import SweepRequest
from orchestrator.sweeps.table import SweepDisplay
from tests.orchestrator.inline_sweeps import Inline
from trainers.claim import Claim
from trainers.identity import read_json

HOUR = 3600.0


def clocked(sweep: Inline, max_seconds: float, claim: Claim) -> Callable[[TrialDesk], None]:
    """What the driver does between two looks, an hour after the third event."""
    request = SweepRequest(sweep.folder.parent, max_seconds=max_seconds)
    elsewhere = replace(sweep.sweep, folder=sweep.folder.parent / "clock")
    driver = SweepDriver(elsewhere, cast(Any, None), request, claim, StopSignals(), SweepDisplay(json=True))

    def look(desk: TrialDesk) -> None:
        if sweep.events == 3:
            driver._began = time.monotonic() - HOUR
        if desk.closing is None and driver._spent(desk):
            desk.close("budget")

    return look


@pytest.mark.parametrize("slots", [1, 2])
def test_time_that_is_used_up_stops_the_sweep_and_more_of_it_goes_on(slots: int, tmp_path: Path) -> None:
    whole = Inline(tmp_path / "whole", slots=slots, trials=3).play().history
    sweep = Inline(tmp_path / "stopped", slots=slots, trials=3)
    with Claim.acquire(tmp_path / "stopped" / "clock") as claim:
        desk = sweep.play(then=clocked(sweep, HOUR / 2, claim))
    assert desk.closing == "budget"
    begun = [trial for trial in desk.history.trials.values() if trial.ending is None]
    assert len(begun) == slots and {reason for _, reason, _ in sweep.closed} == {"budget"}
    for trial in begun:  # saved where it stood
        outcome = read_json(sweep.folder / trial.name / "outcome.json") or {}
        assert (outcome["state"], outcome["reason"]) == ("stopped", "budget") and outcome["tokens"] > 0
    history = sweep.play().history
    assert [t.seen for t in history.trials.values()] == [t.seen for t in whole.trials.values()]
    assert [t.ending and t.ending.reason for t in history.trials.values()] == ["completed"] * 3


def test_time_that_is_left_stops_nothing(tmp_path: Path) -> None:
    """Negative control."""
    sweep = Inline(tmp_path, trials=3)
    with Claim.acquire(tmp_path / "clock") as claim:
        desk = sweep.play(then=clocked(sweep, 2 * HOUR, claim))
    assert desk.closing is None and [reason for _, reason, _ in sweep.closed] == ["completed"] * 3
