"""The same trials under others: plain Ray Tune, Ray Train inside Tune as Ray documents it, Optuna in processes.

A trial sleeps, or trains by the very `train` that ours calls, in a folder of its own; only who starts it differs.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.sweep_process import SweepTimes

SLOTS = 2


@dataclass(frozen=True)
class PeerJob:
    """Plain values."""

    peer: str
    folder: str
    trials: int
    nap_s: float | None
    config: str
    """YAML of the run that each trial trains, but for its learning rate"""
    cache_dir: str


def trial(job: PeerJob, lr: float) -> float:
    """Sleep or train once; the seconds that took, without imports, also noted in the job's folder."""
    if job.nap_s is not None:
        began = time.perf_counter()
        time.sleep(job.nap_s)
    else:
        began = _train(job, lr)
    seconds = time.perf_counter() - began
    (Path(job.folder) / f"seconds-{uuid.uuid4().hex}").write_text(str(seconds), encoding="utf-8")
    return seconds


def _train(job: PeerJob, lr: float) -> float:
    """Train; when it began."""
    import torch

    from trainers.config_io import build_config, load_yaml, override
    from trainers.context import LocalContext
    from trainers.loop import train

    torch.set_num_threads(1)
    config = override(build_config(load_yaml(job.config)), [f"optim.lr={lr!r}"])
    context = LocalContext(Path(job.folder) / f"run-{uuid.uuid4().hex[:12]}", Path(job.cache_dir))
    began = time.perf_counter()
    try:
        train(config, context)
    finally:
        context.close()
    return began


# ---- plain Ray Tune --------------------------------------------------------------------------------------


def tune_functions(job: PeerJob, *, reuse_actors: bool) -> float:
    """Function trainables with Tune's own defaults; the wall time of `fit`."""
    from ray import tune

    def trainable(config: dict[str, Any]) -> None:
        tune.report({"seconds": trial(job, config["lr"])})

    _start_ray()
    return _fit(job, tune.with_resources(trainable, {"CPU": 1}), reuse_actors=reuse_actors)


def tune_train(job: PeerJob) -> float:
    """A TorchTrainer in a Tune function, after Ray's guide for hyperparameter search with Ray Train."""
    from ray import tune

    def driver(config: dict[str, Any]) -> None:
        import ray.train
        from ray.train.torch import TorchTrainer
        from ray.tune.integration.ray_train import TuneReportCallback

        def loop(config: dict[str, Any]) -> None:
            ray.train.report({"seconds": trial(job, config["lr"])})

        TorchTrainer(
            loop,
            train_loop_config=config,
            scaling_config=ray.train.ScalingConfig(num_workers=1),
            run_config=ray.train.RunConfig(
                storage_path=f"{job.folder}/train",
                name=f"train-{tune.get_context().get_trial_id()}",
                callbacks=[TuneReportCallback()],
            ),
        ).fit()

    _start_ray(dashboard=True)
    return _fit(job, tune.with_resources(driver, {"CPU": 0.01}), max_concurrent_trials=SLOTS)


def _start_ray(*, dashboard: bool = False) -> None:
    import ray

    ray.init(address="local", num_cpus=SLOTS, include_dashboard=dashboard, log_to_driver=False)


def _fit(job: PeerJob, trainable: Any, **settings: Any) -> float:
    from ray import tune

    began = time.perf_counter()
    tune.Tuner(
        trainable,
        param_space={"lr": tune.loguniform(1e-4, 1e-2)},
        tune_config=tune.TuneConfig(num_samples=job.trials, **settings),
        run_config=tune.RunConfig(storage_path=f"{job.folder}/tune", name="peer", verbose=0),
    ).fit()
    return time.perf_counter() - began


# ---- Optuna ----------------------------------------------------------------------------------------------


def optuna_processes(job: PeerJob) -> float:
    """Two processes share a study in a journal file; the wall time from their start to their end."""
    import optuna

    began = time.perf_counter()
    optuna.create_study(study_name="peer", storage=_storage(job), sampler=optuna.samplers.RandomSampler())
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_optimize, args=(job, job.trials // SLOTS)) for _ in range(SLOTS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0, process.exitcode
    return time.perf_counter() - began


def _storage(job: PeerJob) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(f"{job.folder}/optuna.log"))


def _optimize(job: PeerJob, trials: int) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name="peer", storage=_storage(job), sampler=optuna.samplers.RandomSampler())
    study.optimize(lambda t: trial(job, t.suggest_float("lr", 1e-4, 1e-2, log=True)), n_trials=trials)


PEERS: dict[str, Callable[[PeerJob], float]] = {
    "tune": functools.partial(tune_functions, reuse_actors=False),
    "tune, actors reused": functools.partial(tune_functions, reuse_actors=True),
    "train in tune": tune_train,
    "optuna": optuna_processes,
}


def main() -> None:
    """Read a PeerJob from the file named, leave the SweepTimes beside it."""
    path = Path(sys.argv[1])
    job = PeerJob(**json.loads(path.read_text(encoding="utf-8")))
    wall_s = PEERS[job.peer](job)
    command_s = time.time() - float(os.environ["BENCHMARK_STARTED"])
    seconds = [float(found.read_text(encoding="utf-8")) for found in sorted(Path(job.folder).glob("seconds-*"))]
    assert len(seconds) == job.trials, (len(seconds), job.trials)
    path.with_suffix(".times").write_text(json.dumps(asdict(SweepTimes(command_s, wall_s, seconds))), encoding="utf-8")


if __name__ == "__main__":
    main()
