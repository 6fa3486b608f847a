"""A trial that sleeps in place of training, inside the very machinery in which trials train."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from orchestrator.sweeps import point
from orchestrator.sweeps.point import PointJob, PointRun


class NapRun(PointRun):
    """PointRun, with `nap` where its seeds would call `train`."""

    def __init__(self, seconds: float, job: PointJob):
        super().__init__(job)
        self._seconds = seconds

    def _train(self) -> Any:
        with (  # in the actor's process
            patch.object(point, "attempt", functools.partial(nap, self._seconds)),
            patch.object(point.SeedRun, "foresee", lambda seed: None),  # a nap takes no memory to compare with a plan
        ):
            return super()._train()


def nap(seconds: float, job: dict[str, Any], open_context: Callable[[], Any]) -> None:
    """Sleep, then record one evaluation and the end, as a training does."""
    from trainers.progress import Outcome
    from trainers.record import MetricsRecord
    from trainers.run import write_outcome

    context = open_context()
    time.sleep(seconds)
    config = job["config"]
    tokens = config["budget"]["tokens"]
    scores = {"val/loss": float(config["optim"]["lr"])}
    record = MetricsRecord(context.run_dir / "metrics.jsonl", context.guard, resume_step=0)
    record.append(1, tokens, "main", scores)
    record.close()
    context.report({"step": 1, "tokens": tokens, **scores})
    write_outcome(context, Outcome("finished", "", 1, tokens, scores))
