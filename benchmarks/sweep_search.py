"""P12: TPE with ASHA against random search, the best validation loss at equal trial-seconds, over several seeds.

Every trial is a real training, by the same point, desk, journal, searcher and rule as in `orchestrate tune`; only Ray
and MLflow are left out, which decide nothing. Two slots take turns in one process: whoever has trained for fewer
seconds trains on, while the other waits at its evaluation, so the seconds are those of a trial alone on its core.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Figure, report
from benchmarks.workload import scratch
from orchestrator.sweeps.desk import TrialDesk
from orchestrator.sweeps.driver import milestones_of
from orchestrator.sweeps.history import Ending, StopReason, Trial
from orchestrator.sweeps.journal import JOURNAL, Journal
from orchestrator.sweeps.point import PointJob, PointRun
from orchestrator.sweeps.rules import build_rule
from orchestrator.sweeps.searchers import build_searcher
from orchestrator.sweeps.settings import SweepSettings
from orchestrator.sweeps.trials import run_of
from search_spaces.space import Axis, Choice, Float, Space
from trainers.claim import Claim, Guard
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.context import request_stop
from trainers.data.prepare import prepare
from trainers.presets import PRESETS

SLOTS = 2
SEEDS = 10
TRIALS = 500
"""more than the seconds suffice for"""
CONFIDENCE = 0.05
SPACE = Space(
    (
        Axis("optim.lr", Float(1e-4, 1.0, log=True)),
        Axis("optim.weight_decay", Float(1e-3, 1.0, log=True)),
        Axis("batch.sequences", Choice((8, 16, 32, 64, 128))),
    )
)
TASK = (
    *("model.d_model=32", "model.n_layers=1", "model.n_heads=2", "model.context_length=32", "model.dropout=0"),
    *("model.dropout_positions=false", "batch.sequences=16", "schedule.warmup_steps=0"),
    *("evaluation.max_tokens=4096", "evaluation.every_epochs=null", "logging.every_steps=1000", "samples.count=0"),
    *("checkpoint.every_minutes=null", "device=cpu", "budget.tokens=32768"),
)
SIDES = {"TPE + ASHA": ("tpe", "asha"), "random search": ("random", "none")}


@dataclass
class Search:
    """What one search found, trial by trial."""

    side: str
    seed: int
    trial_s: list[float] = field(default_factory=list)
    """seconds spent in all trainings when something better was completed"""
    best: list[float] = field(default_factory=list)
    """the loss then"""
    trials: int = 0
    completed: int = 0
    spent_s: float = 0.0
    wall_s: float = 0.0

    def at(self, seconds: float) -> float:
        """The best loss by then; infinite before the first."""
        known = [loss for when, loss in zip(self.trial_s, self.best, strict=True) if when <= seconds]
        return known[-1] if known else math.inf


class BareSeed:
    """A SeedTraining without an MLflow run."""

    def __init__(self, folder: Path, claim: Claim, job: dict[str, Any]):
        self.folder, self.job = folder, job
        self._claim = claim

    def request_stop(self, reason: StopReason) -> None:
        request_stop(self.folder, self._claim.generation, reason)

    def close(self, reason: str, ending: Ending | None) -> None:
        self._claim.release()


def open_bare(base: RunConfig, settings: SweepSettings, folder: Path, cache_dir: Path, trial: Trial) -> list[Any]:
    """The one training of a trial, as `orchestrator.sweeps.training.open_trial` opens it."""
    config = run_of(base, trial.params, settings)
    run_dir = folder / trial.name
    claim = Claim.acquire(run_dir)
    (run_dir / "logs").mkdir()
    job = {
        "config": config.model_dump(mode="json"),
        "run_dir": str(run_dir),
        "cache_dir": str(cache_dir),
        "generation": claim.generation,
        "threads": 1,
        "tracking": {},
        "workers": 1,
        "share": {},
    }
    return [BareSeed(run_dir, claim, job)]


@dataclass
class Slot:
    """A place for a trial, and the seconds that were trained in it."""

    before_s: float = 0.0
    now_s: float = 0.0
    job: PointJob | None = None
    run: PointRun | None = None

    @property
    def seconds(self) -> float:
        return self.before_s + self.now_s


def search(base: RunConfig, side: str, seed: int, seconds: float, folder: Path, cache_dir: Path) -> Search:
    """One search until its trainings have taken `seconds` together."""
    searcher, scheduler = SIDES[side]
    settings = SweepSettings(
        space=SPACE.to_json(), searcher=searcher, scheduler=scheduler, trials=TRIALS, seed=seed,
        tokens=base.budget.tokens,  # type: ignore[union-attr]
    )  # fmt: skip
    found = Search(side, seed)
    began = time.perf_counter()
    with Claim.acquire(folder) as claim:
        desk = TrialDesk(
            Journal(folder / JOURNAL, Guard.begin_attempt(folder, claim.generation)),
            settings,
            build_searcher(settings, SPACE),
            build_rule(settings),
            milestones_of(settings),
            functools.partial(open_bare, base, settings, folder, cache_dir),
            say=print,
        )
        slots = [Slot() for _ in range(SLOTS)]
        for spent in turns(desk, slots):
            found.spent_s = spent
            if spent > seconds:
                break
            best = desk.best()
            if best is not None and (loss := best.ending.values[0]) not in found.best:  # type: ignore[union-attr]
                found.trial_s.append(spent)
                found.best.append(loss)
        desk.close("budget")
        for slot in slots:
            leave(desk, slot)
        desk.finish()
    found.trials = len(desk.history.trials)
    found.completed = sum(trial.ending is not None and trial.ending.reason == "completed"
                          for trial in desk.history.trials.values())  # fmt: skip
    found.wall_s = time.perf_counter() - began
    return found


def turns(desk: TrialDesk, slots: list[Slot]) -> Iterator[float]:
    """What Tune's loop does, one evaluation at a time; the seconds trained so far after each."""
    while True:
        slot = min(slots, key=lambda each: each.seconds)
        if slot.run is None:
            job = desk.next_job()
            assert isinstance(job, PointJob), job
            slot.job, slot.run = job, PointRun(job)
        assert slot.job is not None
        said = slot.run.next().to_json()
        slot.now_s = said["train_s"]
        if said["state"]:
            desk.over(slot.job.number, said, None)
            slot.run.end()
            slot.before_s, slot.now_s, slot.job, slot.run = slot.seconds, 0.0, None, None
        else:
            desk.said(slot.job.number, said)
        yield sum(each.seconds for each in slots)


def leave(desk: TrialDesk, slot: Slot) -> None:
    """Let what still trains come to its end."""
    while slot.run is not None and slot.job is not None:
        said = slot.run.next().to_json()
        if said["state"]:
            slot.run.end()
            desk.over(slot.job.number, said, None)
            return


# ---- the verdict -----------------------------------------------------------------------------------------


def worse(ours: list[float], theirs: list[float]) -> float:
    """p of the exact one-sided paired permutation test that ours are greater: small where we are worse."""
    differences = np.asarray(ours) - np.asarray(theirs)
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    means = (signs * np.abs(differences)).mean(axis=1)
    return float((means >= differences.mean() - 1e-15).mean())


def reached(searches: list[Search], others: list[Search], seconds: float) -> list[float]:
    """The share of the seconds after which each was as good as the other of its seed at the end; inf: never."""
    shares = []
    for mine, other in zip(searches, others, strict=True):
        goal = other.at(seconds)
        when = [at for at, loss in zip(mine.trial_s, mine.best, strict=True) if loss <= goal]
        shares.append(when[0] / seconds if when else math.inf)
    return shares


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training that each search gets")
    options = parser.parse_args(arguments)
    seeds, seconds = (2, 4.0) if options.quick else (SEEDS, options.seconds)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch, which the first trial imports

    searches: dict[str, list[Search]] = {side: [] for side in SIDES}
    with scratch() as folder:
        base = override(PRESETS["fundamentallm/tiny"](), TASK)
        prepare(base, folder / ".cache")
        for seed in range(seeds):
            for side in list(SIDES)[:: -1 if seed % 2 else 1]:
                found = search(base, side, seed, seconds, folder / f"{searches_name(side)}-{seed}", folder / ".cache")
                searches[side].append(found)
                print(
                    f"  seed {seed}, {side:14} {found.trials:4} trials, {found.completed:4} completed: "
                    f"{found.at(seconds):.4f} after {seconds:g} s (wall {found.wall_s:.0f} s)",
                    flush=True,
                )
    ours, theirs = (searches[side] for side in SIDES)
    mine, other = ([found.at(seconds) for found in side] for side in (ours, theirs))
    shares = reached(ours, theirs, seconds)
    figures = [
        Figure("p of a one-sided test that it is worse", worse(mine, other), "", bar=CONFIDENCE, at_least=True),
        Figure("p of a one-sided test that it is better", worse(other, mine), ""),
        Figure("seeds where it is better", float(sum(a < b for a, b in zip(mine, other, strict=True))), f"of {seeds}"),
        Figure("mean best loss, TPE + ASHA", float(np.mean(mine)), "nats"),
        Figure("mean best loss, random search", float(np.mean(other)), "nats"),
        Figure("share of the seconds to random's best, median", float(np.median(shares)), "of all"),
    ]
    report("sweep_search", figures, quick=options.quick, seconds=seconds, runs=searches)


def searches_name(side: str) -> str:
    return side.replace(" ", "").replace("+", "-").lower()


if __name__ == "__main__":
    main()
