"""What runs inside a Ray Train worker: the same `train` under a RayContext."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

FAILURE = "failure.json"


def work(job: dict[str, Any]) -> None:
    """One rank's part of a run. `job` is plain data: config, run_dir, cache_dir, generation, threads.

    What a person must mend (bad input, a training that cannot go on) ends the job in outcome.json and is no reason to
    restart; anything else is raised, and Ray restarts the workers from the last checkpoint.
    """
    import torch

    torch.set_num_threads(job["threads"])  # Ray's default is one thread per worker
    from trainers.config import RunConfig
    from trainers.errors import Superseded, TrainingFailed, UserError
    from trainers.loop import train
    from trainers.progress import Outcome
    from trainers.run import write_outcome

    context = ray_context(Path(job["run_dir"]), Path(job["cache_dir"]), job["generation"])
    try:
        train(RunConfig.model_validate(job["config"]), context)
    except Superseded as superseded:
        context.note(str(superseded))
    except (UserError, TrainingFailed) as error:
        reason = "bad_input" if isinstance(error, UserError) else "training_failed"
        if context.rank == 0:
            write_outcome(context, Outcome("failed", f"{reason}: {error}", 0, 0, {}))
    except Exception as error:
        _give_up_on_the_second(context, error)


def ray_context(run_dir: Path, cache_dir: Path, generation: int) -> Any:
    """This worker's RunContext: the run's folder, and Ray's ear for reports."""
    import ray.train

    from trainers.claim import Guard
    from trainers.collective import collective
    from trainers.context import RunFolder

    class RayContext(RunFolder):
        def report(self, metrics: dict[str, float]) -> None:
            """Collective: at evaluations only, because Ray polls for reports (field notes: up to 2 s each)."""
            ray.train.report(metrics)

    ranks = ray.train.get_context()
    rank, world_size = ranks.get_world_rank(), ranks.get_world_size()
    first = Guard.begin_attempt(run_dir, generation) if rank == 0 else None
    attempt = collective(world_size).from_first(first.attempt if first else None)
    guard = first or Guard.join(run_dir, generation, attempt)
    return RayContext(run_dir, cache_dir, guard, rank, world_size, ranks.get_local_rank())


def _give_up_on_the_second(context: Any, error: Exception) -> None:
    """Raise an unforeseen error for Ray to retry; the same one again is no accident, and ends the run."""
    import json

    from trainers.progress import Outcome
    from trainers.run import write_outcome

    path = context.run_dir / "logs" / FAILURE
    path.parent.mkdir(exist_ok=True)
    this = {"generation": context.guard.generation, "error": f"{type(error).__name__}: {error}"}
    again = path.exists() and json.loads(path.read_text(encoding="utf-8")) == this
    trace = context.run_dir / "logs" / f"rank-{context.rank:05d}-traceback.txt"
    trace.write_text(traceback.format_exc(), encoding="utf-8")
    if again and context.rank == 0:
        write_outcome(context, Outcome("failed", f"crashed twice alike: {this['error']} ({trace})", 0, 0, {}))
    if again:
        os._exit(0) if context.world_size > 1 else None
        return
    path.write_text(json.dumps(this), encoding="utf-8")
    raise error
