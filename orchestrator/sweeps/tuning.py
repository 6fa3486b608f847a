"""Ray Tune as a sweep needs it: it places the trials, keeps their actors, restarts what was killed. What is tried and
what is stopped, it asks of us.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from orchestrator.sweeps.point import PointJob, PointRun

TRIAL_RETRIES = 3  # of a trial whose process was killed
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow and the journal are the record
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are the driver's
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # its snapshot grows with the trials and is never read
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Later:
    """There is nothing to train before one of those at work is done."""


class Desk(Protocol):
    """Who decides: called from Tune's loop, on its thread, one call at a time."""

    def next_job(self) -> PointJob | Later | None:
        """The next point to train; None: there will be none."""
        ...

    def said(self, number: int, result: dict[str, Any]) -> bool:
        """Take in what a trial said (`point.Said`); True: stop it."""
        ...

    def over(self, number: int, result: dict[str, Any], error: str | None) -> None:
        """A trial has ended. `result`: the last it said; `error`: its process died too often."""
        ...


def warm_up(ray: Any, *, slots: int, resources: dict[str, float]) -> None:
    """Start a process for each slot and let it import torch, while the driver does other things. Returns at once.

    Ray gives an actor an idle process with the same environment variables, so they are those that Tune gives its
    actors; were they not, the actors would start as slowly as without.
    """
    from ray.tune.execution.class_cache import DEFAULT_ENV_VARS, ENV_VARS_TO_PROPAGATE

    propagated = {name: os.environ[name] for name in ENV_VARS_TO_PROPAGATE if name in os.environ}
    task = ray.remote(_import_training).options(
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        runtime_env={"env_vars": {**DEFAULT_ENV_VARS, **propagated}},
        max_retries=0,
    )
    for _ in range(slots):
        task.remote()


def _import_training() -> None:
    import trainers.loop  # noqa: F401


def run_trials(desk: Desk, *, points: int, slots: int, resources: dict[str, float], storage: Path) -> None:
    """Train points until the desk has no more of them. `points`: at most so many; `slots`: at a time."""
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    from ray import tune

    tune.Tuner(
        tune.with_resources(_actor(), tune.PlacementGroupFactory([resources])),
        tune_config=tune.TuneConfig(
            search_alg=_asks(desk),
            scheduler=_decides(desk),
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
    ).fit()


def _name(trial: Any) -> str:
    return f"point-{trial.config['job']['number']}"


def _actor() -> Any:
    from ray import tune

    class TrialActor(tune.Trainable):
        """The process of a slot; torch is imported once, however many points it trains."""

        def setup(self, config: dict[str, Any]) -> None:
            self._point = PointRun(PointJob(**config["job"]))

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            if not self._point.end():
                return False  # it still trains: the process cannot be used again
            self._point = PointRun(PointJob(**new_config["job"]))
            return True

        def step(self) -> dict[str, Any]:
            said = self._point.next()
            return {**said.to_json(), "done": bool(said.state)}

        def cleanup(self) -> None:
            self._point.end()

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing: a trial goes on from the checkpoints in its own folder."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Nothing, likewise."""

    return TrialActor


def _asks(desk: Desk) -> Any:
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
            return {"job": job.to_json()}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            died = f"its process died {TRIAL_RETRIES + 1} times" if error else None
            self._desk.over(self._numbers.pop(trial_id), result or {}, died)

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the journal is the memory."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing, likewise."""

    return Asks(desk)


def _decides(desk: Desk) -> Any:
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class Decides(FIFOScheduler):
        """Tune's verdicts, asked of us."""

        def __init__(self, desk: Desk) -> None:
            super().__init__()
            self._desk = desk

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            stops = self._desk.said(trial.config["job"]["number"], result)
            return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE

    return Decides(desk)
