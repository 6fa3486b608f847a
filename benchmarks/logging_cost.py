"""P8: how long a logged step keeps the training thread waiting, beside what other ways of logging cost."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.openmp import spin_briefly

spin_briefly()  # as every command of ours does, before torch is imported

from benchmarks.measure import Figure, quantile, report  # noqa: E402
from benchmarks.workload import QUIET, our_loop, scratch  # noqa: E402
from trainers.config_io import override  # noqa: E402
from trainers.presets import PRESETS  # noqa: E402

BAR_US, AIM_US = 100.0, 30.0
REPORT_MS = 2013.0
"""ray.train.report() back to back at Ray's default poll interval, as measured once on a 2-core machine"""


def stalls(steps: int) -> tuple[list[float], list[float], int]:
    """Seconds of each `log_step` of `fundamentallm/small` logging every step, and of the record's append within it.

    Steps run in between, so the caches are as cold as they are in training. Also the number of rows that arrived.
    """
    settings = [*QUIET, "logging.every_steps=1", f"budget.steps={steps + 1}"]
    config = override(PRESETS["fundamentallm/small"](), settings)
    whole: list[float] = []
    append: list[float] = []
    with scratch() as folder, our_loop(config, folder) as ours:
        run = ours.run
        assert run.record is not None
        run.log_step = _clocked(run.log_step, whole)  # type: ignore[method-assign]
        run.record.append = _clocked(run.record.append, append)  # type: ignore[method-assign]
        ours.steps(steps)
        arrived = len(ours.logged("train/loss"))
    return whole, append, arrived


def _clocked(call: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    @functools.wraps(call)
    def clocked(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            into.append(time.perf_counter() - start)

    return clocked


def mlflow_stalls(calls: int) -> list[float]:
    """Seconds of `mlflow.log_metrics` with five metrics, synchronous, into a SQLite file."""
    with scratch() as folder:
        mlflow = _mlflow(folder)
        with mlflow.start_run():
            taken: list[float] = []
            log = _clocked(mlflow.log_metrics, taken)
            for step in range(calls):
                log({f"metric/{index}": step + index / 7 for index in range(5)}, step=step)
    return taken


def _mlflow(folder: Path) -> Any:
    import logging

    logging.disable(logging.INFO)  # the story of a new database, migration by migration
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    mlflow.set_experiment("logging-cost")
    return mlflow


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args(arguments)
    steps, calls = (60, 10) if options.quick else (options.steps, 300)

    whole, append, arrived = stalls(steps)
    warm = steps // 10
    sync = mlflow_stalls(calls)[calls // 10 :]
    figures = [
        Figure("logged step, p50", quantile(whole[warm:], 0.5) * 1e6, "us", bar=BAR_US),
        Figure("logged step, p50, against the aim", quantile(whole[warm:], 0.5) * 1e6, "us", bar=AIM_US),
        Figure("logged step, p99", quantile(whole[warm:], 0.99) * 1e6, "us", bar=1000.0),
        Figure("of it the record's append, p50", quantile(append[warm:], 0.5) * 1e6, "us"),
        Figure("steps that stand in the record", arrived / steps, "of all", bar=1.0, at_least=True),
        Figure("mlflow.log_metrics, SQLite, p50", quantile(sync, 0.5) * 1e6, "us"),
        Figure("mlflow.log_metrics, SQLite, p99", quantile(sync, 0.99) * 1e6, "us"),
        Figure("ray.train.report, back to back (documented)", REPORT_MS * 1e3, "us"),
    ]
    report("logging_cost", figures, quick=options.quick, log_step_s=whole, append_s=append, mlflow_s=sync)


if __name__ == "__main__":
    main()
