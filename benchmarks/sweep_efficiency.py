"""P11: a sweep's wall time over the ideal, beside plain Ray Tune, Ray Train inside Tune, and Optuna in processes.

The ideal is the time inside train(), summed over the trials and divided by the slots: no imports, no waiting. The wall
time runs, for everybody, from handing the trials to the scheduler with Ray up until the last of them has ended; for us
its MLflow run is closed then too. That of the whole command, with Ray's own start, stands beside it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np

from benchmarks.measure import Figure, report, rounds
from benchmarks.sweep_peers import SLOTS, PeerJob
from benchmarks.sweep_process import SweepJob, SweepTimes
from benchmarks.workload import scratch, two_million
from orchestrator.sweeps.rehearsal import measured_speed
from trainers.config import RunConfig
from trainers.config_io import dump_yaml, override
from trainers.data.prepare import prepare
from trainers.presets import PRESETS

TRIALS = 24
SHORT_S, LONG_S = 1.0, 10.0
BARS = {SHORT_S: 1.35, LONG_S: 1.15}
OURS = "ours"
AS_A_TRIAL = ("checkpoint.at_evaluations=true", "checkpoint.keep_last_n=1", "checkpoint.save_best=false")
"""what a sweep sets in every trial, so that the peers' trials save as often"""


@dataclass(frozen=True)
class Case:
    """Who runs how many trials of which length."""

    side: str
    trials: int
    seconds: float
    naps: bool

    @property
    def kind(self) -> str:
        return f"{self.seconds:g}-s {'sleeps' if self.naps else 'trainings'}"


@dataclass(frozen=True)
class Measured:
    """One sweep."""

    ratio: float
    """wall over ideal"""
    whole: float
    """the whole command over the ideal"""
    trial_s: float
    """mean time inside train()"""
    times: SweepTimes


class Bench:
    """Runs cases in `folder`, each in a process of its own."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._runs_dir = folder / "runs"
        self._cache_dir = self._runs_dir / ".cache"
        self._numbers = count()
        self._speed = 0.0

    def run(self, case: Case) -> Measured:
        """The sweep of `case`; a line on the terminal."""
        number = next(self._numbers)
        config = self._config(case)
        nap_s = case.seconds if case.naps else None
        if case.side == OURS:
            job: SweepJob | PeerJob = SweepJob(
                dump_yaml(config), str(self._runs_dir), f"sweep-{number}", case.trials, nap_s
            )
        else:
            folder = self._folder / f"peer-{number}"
            folder.mkdir()
            job = PeerJob(case.side, str(folder), case.trials, nap_s, dump_yaml(config), str(self._cache_dir))
        times = in_a_process(job, self._folder / f"job-{number}.json")
        spent = sum(times.train_s) if nap_s is None else nap_s * case.trials
        found = Measured(times.wall_s * SLOTS / spent, times.command_s * SLOTS / spent, spent / case.trials, times)
        print(
            f"  {case.side:20} {case.trials:3} x {case.kind:15} wall {times.wall_s:6.1f} s  {found.ratio:.3f} x ideal  "
            f"(command {found.whole:.3f} x, a trial {found.trial_s:.2f} s)",
            flush=True,
        )
        return found

    def _config(self, case: Case) -> RunConfig:
        if case.naps:
            return override(PRESETS["fundamentallm/tiny"](), ["samples.count=0", "budget.steps=100"])
        base = override(two_million(1), AS_A_TRIAL)
        if not self._speed:
            vocab_size = prepare(base, self._cache_dir).tokenizer.vocab_size
            self._speed = measured_speed(base, vocab_size, 1)
        steps = max(1, round(case.seconds * self._speed / base.tokens_per_step))
        return override(base, [f"budget.steps={steps}"])


def in_a_process(job: SweepJob | PeerJob, path: Path) -> SweepTimes:
    """What the job's process measured. Its output is shown where it fails."""
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    module = "sweep_process" if isinstance(job, SweepJob) else "sweep_peers"
    environment = {
        **os.environ,
        "BENCHMARK_STARTED": str(time.time()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [sys.executable, "-m", f"benchmarks.{module}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return SweepTimes(**json.loads(path.with_suffix(".times").read_text(encoding="utf-8")))


def sweeps_of(cases: Sequence[Case], bench: Bench, repeats: int) -> dict[Case, list[Measured]]:
    """Every case `repeats` times, in alternating order."""
    sides: dict[str, Callable[[], Measured]] = {str(case): functools.partial(bench.run, case) for case in cases}
    found = rounds(sides, repeats)
    return {case: found[str(case)] for case in cases}


def plan(part: str, quick: bool) -> list[tuple[list[Case], int]]:
    """Groups of cases, and how often each is run. Peers that are slow, or that cost the same for every trial, get
    fewer trials."""
    naps = part == "sleep"
    if quick:
        short = [Case(side, 4, 0.2 if naps else 0.5, naps) for side in (OURS, "tune", "tune, actors reused", "optuna")]
        return [(short, 1), ([] if naps else [Case("train in tune", 2, 0.5, naps)], 1)]
    short = [
        Case(OURS, TRIALS, SHORT_S, naps),
        Case("tune", TRIALS // 2, SHORT_S, naps),
        Case("tune, actors reused", TRIALS, SHORT_S, naps),
        Case("optuna", TRIALS, SHORT_S, naps),
    ]
    long = [Case(OURS, TRIALS, LONG_S, naps)]
    if not naps:
        long += [Case("tune, actors reused", 8, LONG_S, naps), Case("optuna", 8, LONG_S, naps)]
        long.append(Case("train in tune", 4, SHORT_S, naps))
    return [(short, 3 if naps else 2), (long, 1)]


def figures_of(found: dict[Case, list[Measured]]) -> list[Figure]:
    figures = []
    for case, sweeps in found.items():
        ratios = [sweep.ratio for sweep in sweeps]
        bar = BARS.get(case.seconds) if case.side == OURS else None
        what = f"{case.trials} {case.kind}, {case.side}: wall / ideal"
        figures.append(Figure(what, float(np.median(ratios)), "x", bar=bar))
    for case, sweeps in found.items():
        if case.side == OURS:
            whole = float(np.median([sweep.whole for sweep in sweeps]))
            figures.append(Figure(f"{case.trials} {case.kind}, {case.side}: whole command / ideal", whole, "x"))
            trial_s = float(np.median([sweep.trial_s for sweep in sweeps]))
            figures.append(Figure(f"{case.trials} {case.kind}, {case.side}: a trial", trial_s, "s"))
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=("sleep", "real"), action="append")
    parser.add_argument("--ours", action="store_true", help="without the peers, and nothing is kept")
    options = parser.parse_args(arguments)
    for part in options.part or ("sleep", "real"):
        found: dict[Case, list[Measured]] = {}
        with scratch() as folder:
            bench = Bench(folder)
            bench.run(Case(OURS, 2, 0.1, True))  # makes the MLflow store
            for cases, repeats in plan(part, options.quick):
                chosen = [case for case in cases if case.side == OURS or not options.ours]
                found |= sweeps_of(chosen, bench, repeats)
        samples = [{"case": case, "sweeps": sweeps} for case, sweeps in found.items()]
        report(f"sweep_efficiency_{part}", figures_of(found), quick=options.quick or options.ours, samples=samples)


if __name__ == "__main__":
    main()
