"""P15: what a trial costs the driver at 1,000 null trials and at 10, and how its memory grows.

A null trial does nothing between its start and its one evaluation. Everything else is there: journal, folder, claim,
MLflow run, record, Tune and its actors. The cost is the time between two closed trials, two slots at work, without the
start of Ray and of the actors.
"""

from __future__ import annotations

import argparse
import functools
from itertools import count
from pathlib import Path

import numpy as np

from benchmarks.measure import Figure, report, rounds
from benchmarks.sweep_efficiency import in_a_process
from benchmarks.sweep_process import SweepJob, SweepTimes
from benchmarks.workload import scratch
from trainers.config_io import dump_yaml, override
from trainers.presets import PRESETS

FEW, MANY = 10, 1000
BAR = 1.5
MEMORY_BAR = 1.0  # MB in 1,000 trials
WARM = 2  # the first trial of each slot waits for its actor


def sweep(folder: Path, numbers: count[int], trials: int, searcher: str) -> SweepTimes:
    """A sweep of so many null trials, in a runs folder of its own: the store is as empty as its own sweep leaves it."""
    number = next(numbers)
    config = override(PRESETS["fundamentallm/tiny"](), ["samples.count=0", "budget.steps=100"])
    job = SweepJob(
        dump_yaml(config), str(folder / f"runs-{number}"), "sweep", trials, 0.0, searcher=searcher, watch_memory=True
    )
    times = in_a_process(job, folder / f"job-{number}.json")
    print(f"  {trials:5} null trials, {searcher}: {cost_ms(times):.1f} ms each", flush=True)
    return times


def cost_ms(times: SweepTimes, last: int | None = None) -> float:
    """Mean time from one closed trial to the next, over all of them or the `last` ones."""
    closed = times.closed_at[WARM - 1 :] if last is None else times.closed_at[-last - 1 :]
    return (closed[-1] - closed[0]) / (len(closed) - 1) * 1e3


def memory_slope(times: SweepTimes) -> float:
    """MB of anonymous memory that 1,000 more trials take, fitted to the second half."""
    half = len(times.anonymous_kib) // 2
    kib = times.anonymous_kib[half:]
    return float(np.polyfit(np.arange(len(kib)), kib, 1)[0]) * 1000 / 1024


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=5, help="of the small sweeps; the large one is run once")
    options = parser.parse_args(arguments)
    few, many, repeats = (6, 20, 1) if options.quick else (FEW, MANY, options.repeats)

    samples: dict[str, list[SweepTimes]] = {}
    figures: list[Figure] = []
    with scratch() as folder:
        run = functools.partial(sweep, folder, count())
        for searcher in ("random", "tpe"):
            small = functools.partial(run, few, searcher)
            found = rounds({"small": small}, repeats if searcher == "random" else 1)["small"]
            large = run(many, searcher)
            samples |= {f"{few}, {searcher}": found, f"{many}, {searcher}": [large]}
            before = float(np.median([cost_ms(times) for times in found]))
            bar = BAR if searcher == "random" else None
            figures += [
                Figure(f"{searcher}: cost of a trial at {many:,} / at {few}", cost_ms(large) / before, "x", bar=bar),
                Figure(f"{searcher}: of the last {many // 10} / at {few}", cost_ms(large, many // 10) / before, "x"),
                Figure(f"{searcher}: cost of a trial at {few}", before, "ms"),
                Figure(f"{searcher}: cost of a trial at {many:,}", cost_ms(large), "ms"),
                Figure(
                    f"{searcher}: driver's memory, 1,000 trials more",
                    memory_slope(large),
                    "MB",
                    bar=MEMORY_BAR if searcher == "random" else None,
                ),
            ]
    report("sweep_scale", figures, quick=options.quick, samples=samples)


if __name__ == "__main__":
    main()
