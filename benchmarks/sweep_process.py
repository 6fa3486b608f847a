"""One `orchestrate tune` in this process, with a clock at the places that a benchmark asks about."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.sweep_naps import NapRun
from orchestrator.sweeps import driver, tuning
from orchestrator.sweeps.closing import Closer
from orchestrator.sweeps.desk import TrialDesk
from orchestrator.sweeps.sweep import SweepRequest
from search_spaces.space import Axis, Float, Space
from trainers.config_io import build_config, load_yaml

SPACE = Space((Axis("optim.lr", Float(1e-4, 1e-2, log=True)),))
EVALUATIONS = 1


@dataclass(frozen=True)
class SweepJob:
    """A random search over the learning rate, without early stopping; plain values."""

    config: str
    """YAML"""
    runs_dir: str
    name: str
    trials: int
    nap_s: float | None = None
    """what a trial sleeps in place of training; None: it trains"""
    searcher: str = "random"
    watch_memory: bool = False
    """note the driver's memory whenever a trial ends"""


@dataclass
class SweepTimes:
    """Seconds."""

    command_s: float = 0.0
    """from the start of the process to the end of the sweep"""
    wall_s: float = 0.0
    """from handing the trials to Tune, with Ray up, until the last of them is closed in MLflow"""
    train_s: list[float] = field(default_factory=list)
    """inside train(), of each trial"""
    closed_at: list[float] = field(default_factory=list)
    """when each trial was closed in MLflow too, after the hand-over, in order"""
    anonymous_kib: list[int] = field(default_factory=list)
    """RssAnon of the driver then"""


def run_sweep(job: SweepJob, started: float) -> SweepTimes:
    """Run it to its end. `started`: unix time of the process's start."""
    times = SweepTimes()
    handed_over = 0.0

    def hand_over(*args: Any, **kwargs: Any) -> None:
        nonlocal handed_over
        import ray.tune  # noqa: F401  which the peers have imported then too

        handed_over = time.perf_counter()
        tuning.run_trials(*args, **kwargs)

    def finish(desk: TrialDesk) -> None:
        close(desk)
        times.wall_s = time.perf_counter() - handed_over
        times.train_s = [trial.ending.train_s for trial in desk.history.ended() if trial.ending]

    def close_trial(closer: Closer, *args: Any) -> None:
        close_one(closer, *args)
        times.closed_at.append(time.perf_counter() - handed_over)
        if job.watch_memory:
            times.anonymous_kib.append(anonymous_kib())

    close: Callable[[TrialDesk], None] = TrialDesk.finish
    close_one = Closer._close
    config = build_config(load_yaml(job.config))
    draft = {
        "space_name": "lr",
        "searcher": job.searcher,
        "scheduler": "none",
        "trials": job.trials,
        "evaluations": EVALUATIONS,
    }
    request = SweepRequest(runs_dir=Path(job.runs_dir), name=job.name)
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(driver, "run_trials", hand_over))
        patches.enter_context(patch.object(TrialDesk, "finish", finish))
        patches.enter_context(patch.object(Closer, "_close", close_trial))
        if job.nap_s is not None:
            patches.enter_context(patch.object(tuning, "PointRun", functools.partial(NapRun, job.nap_s)))
        code = driver.tune(config, draft, SPACE, "cpu", request)
    assert code == 0, code
    times.command_s = time.time() - started
    return times


def anonymous_kib() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main() -> None:
    """Read a SweepJob from the file named, leave the SweepTimes beside it."""
    path = Path(sys.argv[1])
    times = run_sweep(SweepJob(**json.loads(path.read_text(encoding="utf-8"))), float(os.environ["BENCHMARK_STARTED"]))
    path.with_suffix(".times").write_text(json.dumps(asdict(times)), encoding="utf-8")


if __name__ == "__main__":
    main()
