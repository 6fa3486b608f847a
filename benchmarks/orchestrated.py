"""P1 at process level: `orchestrate train` with one worker, logging and MLflow on, against the bare loop.

The two and a second bare process (the control) take turns of some seconds: benchmarks/turns.py. Processes alike differ
by some percent for as long as they live (where their pages lie), so all of them are started afresh several times.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.measure import Figure, Ratio, noise_of, ratio, report, rounds
from benchmarks.turns import Row, Training, Turn, started
from benchmarks.workload import BareJob, our_loop, scratch, two_million
from trainers.config_io import dump_yaml
from trainers.record import read_rows

BAR = 1.03
FASTEST_STEP_S = 0.08  # so that nobody reaches the end of its budget within its turns


def ours(config: Path, runs_dir: Path) -> Training:
    """`orchestrate train` with one worker."""
    command = [sys.executable, "-m", "orchestrator", "train", str(config), "--name", "run", "--runs-dir", str(runs_dir)]
    metrics = runs_dir / "run" / "metrics.jsonl"

    def rows() -> list[Row]:
        found = [row for row, _ in read_rows(metrics)] if metrics.exists() else []
        return [Row(row["step"], row["time_ms"], row["train/loss"]) for row in found if "train/loss" in row]

    return Training(command, rows, runs_dir / "ours.log")


def bare(job: Path, folder: Path, name: str) -> Training:
    """One bare process."""
    path = folder / f"{name}.jsonl"

    def rows() -> list[Row]:
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
        return [Row(*json.loads(line)) for line in whole.splitlines()]

    command = [sys.executable, "-m", "benchmarks.bare_process", str(job), str(path)]
    return Training(command, rows, folder / f"{name}.log")


def compare(casts: int, count: int, seconds: float) -> tuple[dict[str, list[Turn]], float]:
    """`count` rounds of turns of ours, a bare process and another one, `casts` times; and the share of equal losses."""
    found: dict[str, list[Turn]] = {"ours": [], "bare": [], "control": []}
    equal: list[float] = []
    for number in range(casts):
        turns, share = cast(count, seconds, f"cast {number + 1} of {casts}")
        equal.append(share)
        for name, side in turns.items():
            found[name] += side
    return found, float(np.mean(equal))


def cast(count: int, seconds: float, what: str) -> tuple[dict[str, list[Turn]], float]:
    """One start of each, and their turns."""
    steps = int(count * seconds / FASTEST_STEP_S) + 500
    config = two_million(steps)
    with scratch() as folder:
        path, runs_dir, job = folder / "config.yaml", folder / "runs", folder / "job"
        path.write_text(dump_yaml(config), encoding="utf-8")
        runs_dir.mkdir()
        with our_loop(config, folder) as opened:
            BareJob.of(opened, steps).save(job)
        (folder / ".cache").rename(runs_dir / ".cache")
        _follow(job, folder / ".cache", runs_dir / ".cache")
        sides = {
            "ours": ours(path, runs_dir),
            "bare": bare(job, folder, "bare"),
            "control": bare(job, folder, "control"),
        }
        with started(sides):
            turns = {name: functools.partial(side.turn, seconds) for name, side in sides.items()}
            found = rounds(turns, count, what=what)
            mine, theirs = sides["ours"].rows(), sides["bare"].rows()
    equal = [np.float32(a.loss) == np.float32(b.loss) for a, b in zip(mine, theirs, strict=False)]
    return found, float(np.mean(equal))


def _follow(job: Path, old: Path, new: Path) -> None:
    """The packed text has moved."""
    path = job / "job.json"
    path.write_text(path.read_text(encoding="utf-8").replace(str(old), str(new)), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--casts", type=int, default=6, help="fresh starts of all processes")
    parser.add_argument("--rounds", type=int, default=4, help="of turns in each")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    options = parser.parse_args(arguments)

    casts, count = (1, 2) if options.quick else (options.casts, options.rounds)
    found, equal = compare(casts, count, options.seconds)
    control = _ratio(found, "control", "step_ms")
    figures = [
        Figure.of("orchestrated step / bare step", _ratio(found, "ours", "step_ms"), bar=BAR, noise=noise_of(control)),
        Figure.of("the same, medians of 10-step intervals", _ratio(found, "ours", "median_ms")),
        Figure.of("the same, CPU seconds of all processes", _ratio(found, "ours", "cpu_ms")),
        Figure.of("control, bare process / bare process", control),
        Figure.of("control, medians of 10-step intervals", _ratio(found, "control", "median_ms")),
        Figure.of("control, CPU seconds", _ratio(found, "control", "cpu_ms")),
        Figure("bare step", float(np.median([turn.step_ms for turn in found["bare"]])), "ms"),
        Figure("losses equal bit for bit", equal, "of all", bar=1.0, at_least=True),
    ]
    report("orchestrated", figures, quick=options.quick, casts=casts, seconds=options.seconds, samples=found)


def _ratio(found: dict[str, list[Turn]], side: str, attribute: str) -> Ratio:
    return ratio(*([getattr(turn, attribute) for turn in found[name]] for name in (side, "bare")))


if __name__ == "__main__":
    main()
