"""What runs inside a Ray Train worker: the same `train` under a RayContext."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUTCOME = "outcome.json"
OUT_OF_MEMORY = "out_of_memory"
"""the kind of an ending in outcome.json"""
STILL_S = 10.0  # between two answers to Ray that the training runs and nothing is new

log = logging.getLogger(__name__)


class News:
    """When Ray Train's next question deserves an answer: a report waits to be taken, or the training is over."""

    def __init__(self) -> None:
        self._event, self._over = threading.Event(), False

    def tell(self) -> None:
        """Something is there now."""
        self._event.set()

    def close(self) -> None:
        """Nobody waits from now on."""
        self._over = True
        self._event.set()

    def wait(self, seconds: float) -> None:
        """Until there is news, `seconds` at most."""
        self._event.wait(seconds)
        self._event.clear()
        if self._over:
            self._event.set()


def work(job: dict[str, Any]) -> None:
    """One rank's part of a run under Ray Train."""

    def open_context() -> Any:
        context = ray_context(Path(job["run_dir"]), Path(job["cache_dir"]), job["generation"], news)
        if context.rank == 0 and context.guard.attempt > 1 and not (context.run_dir / OUTCOME).exists():
            context.note("a worker died: all of them start again from the newest checkpoint")
        if context.world_size == 1:  # several are asked to part when one has died, and must not sleep then
            _answer_late(news)
        return context

    with contextlib.closing(News()) as news:
        attempt(job, open_context)


def _answer_late(news: News) -> None:
    """Let Ray Train's question whether the training still runs wait for news, STILL_S at most.

    The main thread of a Ray worker that has no task looks for signals a hundred times a second, and takes the
    interpreter from the training each time; while it works on an answer it sleeps. Should Ray move what is held on to
    here, all that is lost is that time.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        runner = get_train_context().execution_context.training_thread_runner
        running = runner.is_running
    except (ImportError, AttributeError) as error:
        log.info("Ray Train is answered at once: %s", error)
        return

    def is_running() -> bool:
        news.wait(STILL_S)
        return bool(running())

    runner.is_running = is_running


def attempt(job: dict[str, Any], open_context: Callable[[], Any]) -> None:
    """Train from wherever the run stands. `job` is plain data: config, run_dir, cache_dir, generation, threads, and
    memory_limit, in bytes, where there is one.

    What a person must mend (bad input, a training that cannot go on) ends the job in outcome.json and is no reason to
    restart; anything else is raised, and Ray restarts the workers from the last checkpoint.
    """
    import torch

    torch.set_num_threads(job["threads"])  # Ray's default is one thread per worker
    context = open_context()
    context.tracking = job["tracking"]
    with contextlib.closing(context.guard):  # a process may train a thousand trials, one after another
        _attempt(job, context)


def _attempt(job: dict[str, Any], context: Any) -> None:
    from trainers.config import RunConfig
    from trainers.devices import resolve_device
    from trainers.errors import NonFinite, Superseded, TrainingFailed, UserError
    from trainers.loop import train
    from trainers.memory.limit import held_to, is_out_of_memory

    if (context.run_dir / OUTCOME).exists():  # the run ended, and a worker died after that: nothing is left to do
        return
    try:
        config = RunConfig.model_validate(job["config"])
        with held_to(job.get("memory_limit"), job["threads"], resolve_device(config.device, context.local_rank)):
            train(config, context)
    except Superseded as superseded:
        log.warning("%s", superseded)  # not into the run's folder, which is another's now
    except NonFinite as error:
        _end_in_failure(context, f"nonfinite: {error}")
    except (UserError, TrainingFailed) as error:
        _end_in_failure(context, f"{'bad_input' if isinstance(error, UserError) else 'training_failed'}: {error}")
        if isinstance(error, TrainingFailed) and context.world_size > 1:
            raise  # a save may have failed on this rank alone, and the others wait for it: Ray ends them
    except Exception as error:
        if is_out_of_memory(error):  # it would come back at the same place: the driver decides what is smaller
            _end_in_failure(context, f"{OUT_OF_MEMORY}: {_first_line(error)[:200]}")
            if context.world_size == 1:
                return
            raise  # the other ranks wait for this one: Ray ends them
        if no_accident(context, error):
            _end_in_failure(context, f"crashed twice alike, {_told(error)} (logs/{_failure_name(context)}.txt)")
        raise


def ray_context(run_dir: Path, cache_dir: Path, generation: int, news: News) -> Any:
    """This worker's RunContext: the run's folder, and Ray's ear for reports."""
    import ray.train

    from trainers.claim import Guard
    from trainers.collective import collective
    from trainers.context import RunFolder

    class RayContext(RunFolder):
        def report(self, metrics: dict[str, float]) -> None:
            """Collective: at evaluations only, because Ray polls for reports, and each may wait 2 s."""
            news.tell()
            ray.train.report(metrics)

    ranks = ray.train.get_context()
    rank, world_size = ranks.get_world_rank(), ranks.get_world_size()
    first = Guard.begin_attempt(run_dir, generation) if rank == 0 else None
    attempt = collective(world_size).from_first(first.attempt if first else None)
    guard = first or Guard.join(run_dir, generation, attempt)
    return RayContext(run_dir, cache_dir, guard, rank, world_size, ranks.get_local_rank())


def _end_in_failure(context: Any, reason: str) -> None:
    """outcome.json says why; the first rank to fail has the cause, and what the others say follows from it."""
    from trainers.progress import Outcome
    from trainers.record import last_row
    from trainers.run import write_outcome

    if not (context.run_dir / OUTCOME).exists():
        row = last_row(context.run_dir / "metrics.jsonl") or {}
        write_outcome(context, Outcome("failed", reason, row.get("step", 0), row.get("tokens", 0), {}))


def no_accident(context: Any, error: Exception) -> bool:
    """Whether this rank met the same error in an earlier attempt and the run has recorded nothing new since.

    Ray repeats the attempt after any error; one that comes back at the same place would come back for ever.
    """
    record = context.run_dir / "metrics.jsonl"
    path = context.run_dir / "logs" / f"{_failure_name(context)}.json"
    path.parent.mkdir(exist_ok=True)
    this = {
        "generation": context.guard.generation,
        "error": _told(error),
        "recorded_bytes": record.stat().st_size if record.exists() else 0,
    }
    again = path.exists() and json.loads(path.read_text(encoding="utf-8")) == this
    path.write_text(json.dumps(this), encoding="utf-8")
    path.with_suffix(".txt").write_text(traceback.format_exc(), encoding="utf-8")
    return again


def _failure_name(context: Any) -> str:
    return f"failure-rank-{context.rank:05d}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _first_line(error: Exception) -> str:
    """What it says first; its kind where it says nothing, as Python's own MemoryError."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
