"""P1 at process level: `orchestrate train` with one worker, logging and MLflow on, against the bare loop."""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from benchmarks.measure import Figure, Ratio, noise_of, ratio, report, rounds
from benchmarks.workload import BareJob, our_loop, scratch, two_million
from trainers.config import RunConfig
from trainers.config_io import dump_yaml
from trainers.record import read_rows

BAR = 1.03
SETTLING = 0.4  # of the steps: Ray's start still echoes in its first seconds, and is not a step's cost


@dataclass(frozen=True)
class Steps:
    """One process, its steps looked at from the inside."""

    step_ms: float
    """mean over the part after SETTLING, whatever fell into it"""
    median_ms: float
    """of the intervals between two logged steps in that part: a hiccup does not show"""
    losses: list[float]


def steady(rows: list[tuple[int, float]], losses: list[float]) -> Steps:
    """Step times from (step, unix ms) of the logged steps."""
    kept = rows[int(len(rows) * SETTLING) :]
    steps, times = (np.asarray(column, dtype=np.float64) for column in zip(*kept, strict=True))
    each = np.diff(times) / np.diff(steps)
    return Steps(float((times[-1] - times[0]) / (steps[-1] - steps[0])), float(np.median(each)), losses)


def ours(config: Path, runs_dir: Path, number: count[int]) -> Steps:
    """One `orchestrate train`."""
    name = f"run-{next(number)}"
    command = [sys.executable, "-m", "orchestrator", "train", str(config), "--name", name, "--runs-dir", str(runs_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = [row for row, _ in read_rows(runs_dir / name / "metrics.jsonl") if "train/loss" in row]
    return steady([(row["step"], row["time_ms"]) for row in found], [row["train/loss"] for row in found])


def bare(job: Path) -> Steps:
    """One bare process."""
    command = [sys.executable, "-m", "benchmarks.bare_process", str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return steady([tuple(row) for row in found["rows"]], found["losses"])


def compare(config: RunConfig, steps: int, pairs: int) -> dict[str, list[Steps]]:
    """`pairs` rounds of our process, a bare one and another bare one."""
    with scratch() as folder:
        path, runs_dir, job = folder / "config.yaml", folder / "runs", folder / "job"
        path.write_text(dump_yaml(config), encoding="utf-8")
        runs_dir.mkdir()
        with our_loop(config, folder) as opened:
            BareJob.of(opened, steps).save(job)
        (folder / ".cache").rename(runs_dir / ".cache")
        _follow(job, folder / ".cache", runs_dir / ".cache")
        numbers = count()
        return rounds(
            {
                "ours": functools.partial(ours, path, runs_dir, numbers),
                "bare": functools.partial(bare, job),
                "control": functools.partial(bare, job),
            },
            pairs,
        )


def _follow(job: Path, old: Path, new: Path) -> None:
    """The packed text has moved."""
    path = job / "job.json"
    path.write_text(path.read_text(encoding="utf-8").replace(str(old), str(new)), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args(arguments)
    pairs, steps = (1, 50) if options.quick else (options.pairs, options.steps)

    found = compare(two_million(steps), steps, pairs)
    control = _ratio(found, "control", "bare", "step_ms")
    equal = [
        np.float32(a) == np.float32(b)
        for mine, theirs in zip(found["ours"], found["bare"], strict=True)
        for a, b in zip(mine.losses, theirs.losses, strict=True)
    ]
    figures = [
        Figure.of(
            "orchestrated step / bare step", _ratio(found, "ours", "bare", "step_ms"), bar=BAR, noise=noise_of(control)
        ),
        Figure.of("the same, medians of 10-step intervals", _ratio(found, "ours", "bare", "median_ms")),
        Figure.of("control, bare process / bare process", control),
        Figure.of("control, medians of 10-step intervals", _ratio(found, "control", "bare", "median_ms")),
        Figure("bare step", float(np.median([steps.step_ms for steps in found["bare"]])), "ms"),
        Figure("losses equal bit for bit", float(np.mean(equal)), "of all", bar=1.0, at_least=True),
    ]
    report("orchestrated", figures, quick=options.quick, steps=steps, settling=SETTLING, samples=found)


def _ratio(found: dict[str, list[Steps]], mine: str, theirs: str, attribute: str) -> Ratio:
    return ratio(*([getattr(steps, attribute) for steps in found[side]] for side in (mine, theirs)))


if __name__ == "__main__":
    main()
