"""Laws of points that make no run: each stands in MLflow once, failed, wherever the telling of it was cut off."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.sweeps import refused
from orchestrator.sweeps.history import PENALTY, Ending, History
from orchestrator.sweeps.refused import REFUSED, enter_refused, untold
from orchestrator.sweeps.stored import results_of
from orchestrator.tracked import StoredRun, children_of, runs_of_kind
from orchestrator.tracker import OpeningStore
from orchestrator.tracking import Store, TrackedRun
from tests.orchestrator.inline_sweeps import Inline


class Kill(Exception):
    """The driver is no more."""


class Refusing:
    """A sweep of two seeds a point whose trial 0 was refused, below a run of its own in the store."""

    def __init__(self, folder: Path, store: Store):
        self.sweep = Inline(folder / "inline", seeds=2).sweep
        self.sweep.folder.mkdir()
        self.store, self.opening = store, OpeningStore(folder)
        tags = {"kind": "sweep", "sweep.settings": self.sweep.settings.model_dump_json()}
        self.parent = store.open_run("laws", "sweep", run_id=None, tags=tags, params={})
        self.history = History()
        self.trial = self.history.ask(0, {"optim.lr": 0.25})
        self.history.end(0, Ending("error", (PENALTY,), 0, 0.0, "optim.lr: not today."))

    def tell(self) -> None:
        enter_refused(self.sweep, self.trial, self.opening, self.parent.run_id)

    def children(self) -> list[StoredRun]:
        [parent] = runs_of_kind(self.store, "sweep")
        return sorted(children_of(self.store, parent), key=lambda run: run.name)


@pytest.fixture
def refusing(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Refusing:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "laws")
    return Refusing(tmp_path, store)


def assert_told_once(told: Refusing) -> None:
    assert [run.name for run in told.children()] == ["sweep/t0000-s0", "sweep/t0000-s1"]
    for run in told.children():
        assert (run.status, run.tags["stop_reason"], run.tags["kind"]) == ("FAILED", "error", "trial")
        assert run.tags["error"] == "optim.lr: not today."
        assert run.params == {"optim.lr": "0.25"} and run.metrics["sweep/objective"] == PENALTY
        assert len(told.store.client.get_metric_history(run.run_id, "sweep/objective")) == 1
    assert not list(untold(told.sweep, told.history))


def test_a_refused_point_is_a_failed_trial_of_the_report(refusing: Refusing) -> None:
    assert list(untold(refusing.sweep, refusing.history)) == [refusing.trial]
    refusing.tell()
    assert_told_once(refusing)
    [parent] = runs_of_kind(refusing.store, "sweep")
    [point] = results_of(refusing.store, parent).points
    assert (point.number, point.state, len(point.trials), dict(point.params)) == (0, "error", 2, {"optim.lr": 0.25})


@pytest.mark.parametrize("cut", ["create", "note", "metrics", "finish", "end"])
def test_cut_off_anywhere_it_stands_there_once(cut: str, refusing: Refusing, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each step of the telling."""

    def killed(*_: object, **__: object) -> None:
        raise Kill

    with monkeypatch.context() as patch:
        if cut == "create":
            patch.setattr(refused, "write_atomically", killed)
        elif cut == "note":
            patch.setattr(TrackedRun, "log_metrics", killed)
        elif cut == "metrics":
            patch.setattr(TrackedRun, "finish", killed)
        elif cut == "finish":
            patch.setattr(TrackedRun, "finish", _then_kill(TrackedRun.finish))
        else:
            refusing.tell()
        if cut != "end":
            with pytest.raises(Kill):
                refusing.tell()
    refusing.tell()
    assert_told_once(refusing)


def _then_kill(method: object) -> object:
    def act(*arguments: object) -> None:
        method(*arguments)  # type: ignore[operator]
        raise Kill

    return act


def test_forgotten_it_would_be_told_twice(refusing: Refusing) -> None:
    """Negative control."""
    refusing.tell()
    for note in refusing.sweep.folder.glob(f"*/{REFUSED}"):
        note.unlink()
    refusing.tell()
    assert len(refusing.children()) == 4
