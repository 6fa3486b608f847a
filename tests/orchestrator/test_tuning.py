"""Laws of what Tune holds of a sweep: little of each trial, however many there are. Without a cluster."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.sweeps import tuning
from orchestrator.sweeps.point import PointJob
from orchestrator.sweeps.tuning import Died

SEED = {"run_dir": "s/t0007", "config": {"optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "seed": 1}, "generation": 1}


def job_of(number: int) -> PointJob:
    return PointJob(number, [SEED, SEED], ["val/loss"], [100, 200])


def test_to_tune_a_point_is_one_value() -> None:
    """It flattens every result, and keeps ten figures for each number that it finds."""
    from ray.tune.utils import flatten_dict

    def found(value: object) -> dict[str, Any]:
        return flatten_dict({"config": {"job": value}})

    assert found(job_of(7)) == {"config/job": job_of(7)} and str(job_of(7)) == "point-7"
    assert sum(isinstance(value, int | float) for value in found(asdict(job_of(7))).values()) >= 1  # control


def test_of_those_that_ended_tune_keeps_none_but_the_last() -> None:
    from ray.tune.experiment import Trial

    trials = [Trial("stub", config={"job": job_of(number)}, stub=True) for number in range(4)]
    *before, running, last = trials
    controller = SimpleNamespace(_trials=list(trials), _trials_to_cache=set(trials), _stopped_trials=set(before))
    for trial in before:
        trial.set_status(Trial.TERMINATED)
    for trial in (running, last):
        trial.set_status(Trial.RUNNING)
    tuning._decides(SimpleNamespace(), {}).on_trial_complete(controller, last, {})  # type: ignore[arg-type]
    assert controller._trials == [running, last]  # Tune still has to stop the last one
    assert not controller._stopped_trials and not controller._trials_to_cache


ENDED = """Failure # 1 (occurred at 2026-01-02_03-04-05)
The actor died unexpectedly before finishing this task.
\tpid: 7
The actor is dead because its worker process has died: SIGSEGV.
"""
STARVED = """Failure # 2 (occurred at 2026-01-02_03-05-05)
1 worker(s) were killed due to the node running low on memory. Memory on the node was 30.1GB used / 31GB limit (0.97)
Considered workers: [
Refer to the documentation on how to address the out of memory issue.
"""


@pytest.mark.parametrize(
    ("deaths", "reason", "said"),
    [(ENDED, "error", "SIGSEGV"), (ENDED + STARVED, "oom", "30.1GB used"), (STARVED + ENDED, "error", "SIGSEGV")],
)
def test_a_trial_that_died_too_often_says_of_what(deaths: str, reason: str, said: str, tmp_path: Path) -> None:
    """The last time: of memory it is `oom`. Tune tells the scheduler of the trial, and then the searcher of its end."""
    (tmp_path / "error.txt").write_text(deaths)
    heard: list[tuple[int, Any]] = []
    desk: Any = SimpleNamespace(next_job=lambda: job_of(7), over=lambda number, _, died: heard.append((number, died)))
    notes: dict[int, Died] = {}
    asks, decides = tuning._asks(desk, notes), tuning._decides(desk, notes)
    trial = SimpleNamespace(config=asks.suggest("a"), error_file=str(tmp_path / "error.txt"))
    decides.on_trial_error(None, trial)
    asks.on_trial_complete("a", error=True)
    [(number, died)] = heard
    assert number == 7 and died.reason == reason and "its process died" in died.message and said in died.message


@pytest.mark.parametrize("known", [True, False], ids=["as it is", "control"])
def test_an_actor_killed_for_memory_is_one_that_died(known: bool) -> None:
    """To Tune itself it is an unexpected error, over which it ends all trials."""
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    failed: list[Exception] = []
    actor = SimpleNamespace(actor_id=1, _on_error=None)
    task: Any = SimpleNamespace(_tracked_actor=actor, _on_error=lambda _, error: failed.append(error))
    manager = RayActorManager(resource_manager=SimpleNamespace())
    manager._cleanup_actor = lambda tracked_actor: None
    starved = OutOfMemoryError(STARVED)
    with tuning.starved_is_dead() if known else pytest.raises(RuntimeError, match="unexpected"):
        manager._actor_task_failed(tracked_actor_task=task, exception=starved)
    assert [isinstance(error, RayActorError) and "low on memory" in str(error) for error in failed] == [True] * known


def test_of_those_that_wait_the_first_is_started() -> None:
    """And none of those that ended is looked at."""
    from ray.tune.experiment import Trial

    def trial(number: int, status: str) -> Any:
        return SimpleNamespace(config={"job": job_of(number)}, status=status)

    live = {number: trial(number, Trial.PENDING) for number in (12, 11)} | {10: trial(10, Trial.RUNNING)}
    controller = SimpleNamespace(get_live_trials=lambda: list(live.values()))
    choose = tuning._decides(SimpleNamespace(), {}).choose_trial_to_run  # type: ignore[arg-type]
    assert choose(controller) is live[11]
    live[11].status = live[12].status = Trial.RUNNING
    assert choose(controller) is None
