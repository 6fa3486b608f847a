"""Laws of the driver of a sweep: what befalls MLflow or Tune, it ends truthfully, and what was left goes on.

Real trainings and a real store in this process, without Ray (tuneless.py); through Ray in test_sweeps.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator import tracker
from orchestrator.sweeps import closing, desk
from orchestrator.sweeps.desk import TrialDesk
from orchestrator.sweeps.driver import DONE, POLL_S, STOPPED
from orchestrator.tracking import Store
from tests.orchestrator.faults import read, tracked
from tests.orchestrator.store_server import Server
from tests.orchestrator.sweep_episodes import assert_sweep_told, children_of
from tests.orchestrator.tuneless import Tuneless
from trainers.errors import UserError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "CLOSE_S", 1.0)
    monkeypatch.setattr(closing, "STANDS_BACK_S", 0.0)


@pytest.fixture
def local(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tuneless:
    """Over a store that is always there."""
    return Tuneless(tmp_path, monkeypatch)


@pytest.fixture
def remote(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tuneless:
    """Over a server that can fail."""
    return Tuneless(tmp_path, monkeypatch)


def parent_of(sweep: Tuneless) -> Any:
    return tracked(sweep.runs, read(sweep.folder, "sweep.json")["mlflow_run_id"])


def statuses(sweep: Tuneless) -> dict[str, str]:
    """Trial -> how its run stands in MLflow."""
    children = children_of(sweep.runs, parent_of(sweep).run_id)
    return {name.removeprefix("s/"): tracked(sweep.runs, run_id).status for name, [run_id] in children.items()}


# ---- a store that goes away ------------------------------------------------------------------------------------------


def fail_in(sweep: Tuneless, server: Server, trial: int, looks: int) -> None:
    """The server fails from the first evaluation of a trial on, until the desk has put Tune off so many times."""
    waited = 0

    def heard(_: TrialDesk, number: int, result: dict[str, Any]) -> None:
        server.failing = server.failing or (number == trial and not waited)

    def idle(_: TrialDesk) -> None:
        nonlocal waited
        waited += 1
        server.failing = server.failing and waited < looks

    sweep.heard, sweep.idle = heard, idle


def test_a_store_that_is_away_for_a_while_ends_no_sweep(
    remote: Tuneless, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """What trains goes on, the next trial begins when it is back, and in the end MLflow has everything once."""
    fail_in(remote, server, trial=0, looks=10)
    assert remote.tune() == DONE
    said = capsys.readouterr().out
    assert server.refused > 0
    assert said.count("the next one begins when it is back") == said.count("trials begin again") == 1
    assert {trial.ending.reason for trial in remote.history.ended() if trial.ending} == {"completed"}
    assert_sweep_told(remote.runs, "s")
    assert remote.tune() == DONE and remote.trained == 0


def test_taken_for_bad_input_it_would_end_it(
    remote: Tuneless, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Negative control of the above."""
    monkeypatch.setattr(desk, "StoreAway", type("Never", (UserError,), {}))
    fail_in(remote, server, trial=0, looks=10)
    assert remote.tune() == cli_bad_input()
    assert len(list(remote.history.ended())) < 3


def cli_bad_input() -> int:
    from orchestrator.cli import BAD_INPUT

    return BAD_INPUT


def test_several_seeds_are_opened_together_or_not_at_all(
    remote: Tuneless, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store goes away between the first seed and the second: neither is held, and both begin later."""
    opened = tracker.Tracker.open
    names: list[str] = []

    def open_one(self: tracker.Tracker) -> None:
        server.failing = names == ["s/t0000-s0"]
        names.append(self.experiment.name)
        opened(self)

    monkeypatch.setattr(tracker.Tracker, "open", open_one)
    assert remote.tune("--seeds", "2", trials=1) == DONE
    assert names == ["s/t0000-s0", "s/t0000-s1", "s/t0000-s0", "s/t0000-s1"]
    assert_sweep_told(remote.runs, "s")


def test_ctrl_c_does_not_wait_for_the_store(remote: Tuneless, server: Server) -> None:
    fail_in(remote, server, trial=0, looks=10**9)
    fails, waited = remote.idle, 0

    def idle(desk: TrialDesk) -> None:
        nonlocal waited
        waited += 1
        fails(desk)
        if waited == 5:
            desk.close("user")

    remote.idle = idle
    assert remote.tune() == STOPPED
    server.failing = False
    remote.idle = lambda desk: None
    remote.heard = lambda desk, number, result: None
    assert remote.tune() == DONE
    assert_sweep_told(remote.runs, "s")


def test_away_at_the_very_end_it_is_told_by_the_same_command(
    remote: Tuneless, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sweep is done: exit code 0; what MLflow was not told is paid without training anything."""

    def heard(_: TrialDesk, number: int, result: dict[str, Any]) -> None:
        server.failing = number == 2 and bool(result["state"])

    remote.heard = heard
    assert remote.tune() == DONE
    said = capsys.readouterr()
    assert "internal error" not in said.err and said.out.count("tells it the rest") == 1
    assert read(remote.folder, "sweep.json")["finished"] == 3
    server.failing = False
    assert parent_of(remote).status == "RUNNING"  # control: it was not told
    assert remote.tune() == DONE and remote.trained == 0
    assert_sweep_told(remote.runs, "s")
    assert "nothing to do" not in capsys.readouterr().out
    assert remote.tune() == DONE
    assert "nothing to do" in capsys.readouterr().out


# ---- Tune itself fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgotten", [False, True], ids=["as it is", "control"])
def test_what_a_failed_tune_leaves_at_work_is_closed_and_goes_on(forgotten: bool, local: Tuneless) -> None:
    """As a failed trial that can go on. Forgotten by the desk, its run would stay RUNNING for ever."""

    def fail(desk: TrialDesk, number: int, result: dict[str, Any]) -> None:
        if number == 1 and desk.history.trials[1].seen:
            if forgotten:
                desk.running.clear()
            raise RuntimeError("Tune is no more")

    local.heard = fail
    assert local.tune() not in (DONE, STOPPED)
    assert parent_of(local).status == "FAILED"
    assert statuses(local) == {"t0000": "FINISHED", "t0001": "RUNNING" if forgotten else "FAILED"}
    if not forgotten:
        local.heard = lambda desk, number, result: None
        assert local.tune() == DONE and local.trained == 2
        assert_sweep_told(local.runs, "s")


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_a_budget_that_all_trials_use_up_exactly_stops_nothing(
    local: Tuneless, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last evaluation uses it up while the last trial still winds down: the sweep is done, and stays done."""

    def linger(_: TrialDesk, number: int, result: dict[str, Any]) -> None:
        if result["state"] or (number, result["tokens"]) == (0, local_tokens(local) // 4):
            time.sleep(3 * POLL_S)  # the driver looks

    local.heard = linger
    assert local.tune("--max-tokens", "1") == STOPPED  # control: something is left
    assert "used up" in capsys.readouterr().out
    total = 3 * local_tokens(local)
    assert local.tune("--max-tokens", str(total)) == DONE
    assert "used up" not in capsys.readouterr().out
    assert sum(trial.seen[-1].tokens for trial in local.history.trials.values()) >= total
    assert_sweep_told(local.runs, "s")
    assert local.tune("--max-tokens", str(total)) == DONE and local.trained == 0


def local_tokens(sweep: Tuneless) -> int:
    return int(read(sweep.folder, "sweep.json")["settings"]["tokens"])
