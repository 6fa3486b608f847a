"""Whole `orchestrate tune` commands in this process: the driver, the desk, MLflow and real trainings, without Ray.

What Tune does is here a loop over the slots in turn, as in inline_sweeps.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.sweeps import driver
from orchestrator.sweeps.desk import TrialDesk
from orchestrator.sweeps.history import History
from orchestrator.sweeps.journal import JOURNAL, read_history
from orchestrator.sweeps.point import PointRun
from orchestrator.sweeps.tuning import Later
from tests.trainers.small_runs import config_for, write_text
from trainers.config_io import dump_yaml

STEPS = 12
SPACE = ["--set-space", "optim.lr=log(1e-3,3e-2)", "--searcher", "random", "--scheduler", "none"]


class Tuneless:
    """A runs folder, and the sweep `s` in it."""

    def __init__(self, runs: Path, monkeypatch: pytest.MonkeyPatch):
        self.runs, self.folder, self.config = runs, runs / "s", runs / "mine.yaml"
        self.config.write_text(dump_yaml(config_for(write_text(runs))))
        self.heard: Callable[[TrialDesk, int, dict[str, Any]], None] = lambda desk, number, result: None
        """called with every evaluation and end before the desk hears of it"""
        self.idle: Callable[[TrialDesk], None] = lambda desk: None
        """called where the desk has nothing for now"""
        self.trained = 0
        """trials that were begun or gone on with in the last command"""
        monkeypatch.setattr(driver, "ray_cluster", _one_cpu)
        monkeypatch.setattr(driver, "run_trials", self._loop)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def tune(self, *arguments: str, trials: int = 3) -> int:
        """The exit code of `orchestrate tune`."""
        self.trained = 0
        named = ["--name", "s", "--runs-dir", str(self.runs), "--trials", str(trials), "--evaluations", "4"]
        return cli.main(["tune", str(self.config), *named, *SPACE, *arguments])

    @property
    def history(self) -> History:
        return read_history(self.folder / JOURNAL)

    def kept(self) -> set[str]:
        """The trainings that have their checkpoints."""
        return {path.parent.name for path in self.folder.glob("t*/checkpoints")}

    def _loop(self, desk: TrialDesk, *, slots: int, **_: Any) -> None:
        runs: list[tuple[int, PointRun]] = []
        try:
            while True:
                job = None
                while len(runs) < slots and not isinstance(job := desk.next_job(), Later) and job is not None:
                    runs.append((job.number, PointRun(job)))
                    self.trained += 1
                if not runs and job is None:
                    return
                if not runs:
                    self.idle(desk)
                    time.sleep(0.02)
                for number, run in list(runs):
                    result = run.next().to_json()
                    self.heard(desk, number, result)
                    if result["state"] or desk.said(number, result):
                        runs.remove((number, run))
                        desk.over(number, result, None)
                        assert run.end()
        finally:
            for _, run in runs:
                assert run.end()


@contextmanager
def _one_cpu(*_: Any, **__: Any) -> Iterator[Any]:
    total = {"CPU": 1.0}
    yield SimpleNamespace(
        cluster_resources=lambda: total,
        nodes=lambda: [{"NodeID": "one", "Alive": True, "Resources": total}],
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "one"),
    )
