"""Ray Tune as a sweep needs it: it places the trials, keeps their actors, restarts what was killed. What is tried and
what is stopped, it asks of us.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from orchestrator.sweeps.point import PointJob, PointRun

TRIAL_RETRIES = 3  # of a trial whose process was killed
TOGETHER_S = 10.0  # patience of a process with those that start beside it
MESSAGE_CHARS = 300
FAILURE = re.compile(r"^Failure # \d+ .*$", re.M)
LOW_ON_MEMORY = re.compile(r"killed due to the node running low on memory")  # by Ray's memory monitor (ray 2.60)
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow and the journal are the record
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are the driver's
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # its snapshot grows with the trials and is never read
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Later:
    """There is nothing to train for now: ask again."""


@dataclass(frozen=True)
class Died:
    """A trial was given up because its process died too often."""

    message: str
    reason: Literal["oom", "error"] = "error"


class Desk(Protocol):
    """Who decides: called from Tune's loop, on its thread, one call at a time."""

    def next_job(self) -> PointJob | Later | None:
        """The next point to train; None: there will be none."""
        ...

    def said(self, number: int, result: dict[str, Any]) -> bool:
        """Take in what a trial said (`point.Said`); True: stop it."""
        ...

    def over(self, number: int, result: dict[str, Any], died: Died | None) -> None:
        """A trial has ended. `result`: the last it said."""
        ...


AHEAD = ("ray.tune", "orchestrator.sweeps.point", "trainers.loop")
"""what the process of a trial imports before it can train"""


def run_trials(
    desk: Desk, *, points: int, slots: int, resources: dict[str, float], storage: Path, started_ahead: bool = False
) -> None:
    """Train points until the desk has no more of them.

    `points`: at most so many; `slots`: at a time; `started_ahead`: the cluster has processes that imported AHEAD.
    """
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    from ray import tune

    if started_ahead:
        _take_started_processes()
    deaths: dict[int, Died] = {}
    tuner = tune.Tuner(
        _actor(Together(storage / "started", slots), resources),
        tune_config=tune.TuneConfig(
            search_alg=_asks(desk, deaths),
            scheduler=_decides(desk, deaths),
            num_samples=points,
            max_concurrent_trials=slots,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(storage),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=TRIAL_RETRIES),
        ),
    )
    with starved_is_dead():
        tuner.fit()


def _take_started_processes() -> None:
    """Let Tune's actors ask for no environment variables of their own, for which Ray would start new processes.

    Those of a local cluster have the driver's already.
    """
    from ray.tune.execution import class_cache

    class_cache.DEFAULT_ENV_VARS = {}
    class_cache.ENV_VARS_TO_PROPAGATE = set()


@contextlib.contextmanager
def starved_is_dead() -> Iterator[None]:
    """Inside, Tune treats an actor that Ray killed because its node ran low on memory like any other that died: by
    itself it raises over the unknown error, which ends all trials (ray 2.60)."""
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    known = RayActorManager._actor_task_failed

    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        known(self, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = known


def _name(trial: Any) -> str:
    return f"point-{trial.config['job'].number}"


@dataclass(frozen=True)
class Together:
    """The first processes of a sweep begin together.

    Tune gives the process of a trial that has ended to the next one that waits for its own, and throws away the one
    that is coming up for it. So trials that are shorter than the start of a process would be trained in one slot, with
    a process for ever coming up for the others.
    """

    folder: Path
    count: int

    def wait(self) -> None:
        """Until so many have come, or never will."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / uuid.uuid4().hex).touch()
        deadline = time.monotonic() + TOGETHER_S
        while len(os.listdir(self.folder)) < self.count and time.monotonic() < deadline:
            time.sleep(0.02)


def _actor(together: Together, resources: dict[str, float]) -> Any:
    from ray import tune

    class TrialActor(tune.Trainable):
        """The process of a slot; torch is imported once, however many points it trains."""

        @classmethod
        def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
            return tune.PlacementGroupFactory([resources])

        def setup(self, config: dict[str, Any]) -> None:
            together.wait()
            self._point = PointRun(config["job"])

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            if not self._point.end():
                return False  # it still trains: the process cannot be used again
            self._point = PointRun(new_config["job"])
            return True

        def step(self) -> dict[str, Any]:
            self.config: dict[str, Any] = {}  # it would travel back with every result
            said = self._point.next()
            return {**said.to_json(), "done": bool(said.state)}

        def cleanup(self) -> None:
            self._point.end()

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing: a trial goes on from the checkpoints in its own folder."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Nothing, likewise."""

    return TrialActor


def _asks(desk: Desk, deaths: dict[int, Died]) -> Any:
    from ray.tune.search import Searcher

    class Asks(Searcher):
        """Tune's questions, passed on."""

        def __init__(self, desk: Desk) -> None:
            super().__init__(metric="tokens", mode="max")  # Tune wants one; nothing reads it
            self._desk = desk
            self._numbers: dict[str, int] = {}

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles it into a snapshot that nobody reads

        def suggest(self, trial_id: str) -> Any:
            job = self._desk.next_job()
            if job is None:
                return Searcher.FINISHED
            if isinstance(job, Later):
                return None
            self._numbers[trial_id] = job.number
            return {"job": job}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            number = self._numbers.pop(trial_id)
            self._desk.over(number, result or {}, deaths.pop(number) if error else None)

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the journal is the memory."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing, likewise."""

    return Asks(desk)


def _decides(desk: Desk, deaths: dict[int, Died]) -> Any:
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class Decides(FIFOScheduler):
        """Tune's verdicts, asked of us."""

        def __init__(self, desk: Desk) -> None:
            super().__init__()
            self._desk = desk

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            stops = self._desk.said(trial.config["job"].number, result)
            return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE

        def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
            """At each death of its process, and after the last before the searcher hears of it, but not why."""
            deaths[trial.config["job"].number] = death_of(Path(trial.error_file))

        def choose_trial_to_run(self, tune_controller: Any) -> Any:
            """The first of the few that live; FIFO would look through all that ever were, at every step of the loop."""
            waiting = [trial for trial in tune_controller.get_live_trials() if trial.status == Trial.PENDING]
            return min(waiting, key=lambda trial: trial.config["job"].number, default=None)

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            """Let go of those that ended before: Tune keeps them all, and would write them down at the end."""
            for ended in [each for each in tune_controller._trials if each.is_finished()]:
                tune_controller._trials.remove(ended)
                tune_controller._stopped_trials.discard(ended)
            tune_controller._trials_to_cache.clear()

    return Decides(desk)


def death_of(error_file: Path) -> Died:
    """Why a process died, by what Tune wrote down: for each death a line "Failure # 2 ..." and the error's text."""
    *_, words = FAILURE.split(error_file.read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip() for line in words.splitlines() if line.strip()] or ["nobody knows why"]
    starved = next((line for line in lines if LOW_ON_MEMORY.search(line)), None)
    said = (starved or lines[-1])[:MESSAGE_CHARS]
    return Died(f"its process died {TRIAL_RETRIES + 1} times, at last: {said}", "oom" if starved else "error")
