"""Laws of what Tune holds of a sweep: little of each trial, however many there are. Without a cluster."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from orchestrator.sweeps import tuning
from orchestrator.sweeps.point import PointJob

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
    tuning._decides(SimpleNamespace()).on_trial_complete(controller, last, {})  # type: ignore[arg-type]
    assert controller._trials == [running, last]  # Tune still has to stop the last one
    assert not controller._stopped_trials and not controller._trials_to_cache


def test_of_those_that_wait_the_first_is_started() -> None:
    """And none of those that ended is looked at."""
    from ray.tune.experiment import Trial

    def trial(number: int, status: str) -> Any:
        return SimpleNamespace(config={"job": job_of(number)}, status=status)

    live = {number: trial(number, Trial.PENDING) for number in (12, 11)} | {10: trial(10, Trial.RUNNING)}
    controller = SimpleNamespace(get_live_trials=lambda: list(live.values()))
    choose = tuning._decides(SimpleNamespace()).choose_trial_to_run  # type: ignore[arg-type]
    assert choose(controller) is live[11]
    live[11].status = live[12].status = Trial.RUNNING
    assert choose(controller) is None
