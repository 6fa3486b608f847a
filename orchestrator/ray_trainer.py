"""Ray Train's trainer of one run, without the parts of Ray Train that a run has no use for.

Each of them is a process that imports ray.train for 1.7 s of CPU, on the cores that the workers start on: together
they delay the first step by a third on a small machine (benchmarks/first_step.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.ray_cluster import Resources

WORKER_RESTARTS = 3  # crashes that Ray mends from the last checkpoint, before the driver looks whether that helps
UNUSED = {"DatasetsCallback"}  # deals out Ray Datasets; ours are packed files
UNUSED_ALONE = {"PlacementGroupCleanerCallback"}  # frees what a dead controller held; a cluster of ours dies with it


def while_it_gets_further(
    fit: Callable[[int], BaseException | None], saved_step: Callable[[], int], *, over: Callable[[], bool]
) -> BaseException | None:
    """Call `fit(0)`, `fit(1)`, ... until the run is over, or one fit ends without having saved a later step.

    Ray counts the crashes of a fit whatever lies between them, so one fit would end a run of days for a few unrelated
    ones. A fit that got further has earned another. Returns the last fit's error.
    """
    number = 0
    while True:
        before = saved_step()
        error = fit(number)
        if error is None or over() or saved_step() <= before:
            return error
        number += 1


def build_trainer(
    work: Callable[[dict[str, Any]], None], job: dict[str, Any], *, workers: int, cpus: int, gpus: int, number: int = 0
) -> Any:
    """The trainer whose `fit` runs `work(job)` on `workers` workers with `cpus` and `gpus` each.

    `number` counts the fits of one claim.

    One worker has nobody to talk to and gets no process group, so that neither this process nor Ray Train's
    controller imports torch.
    """
    import ray.train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    alone = not os.environ.get("RAY_ADDRESS")
    unused = UNUSED | UNUSED_ALONE if alone else UNUSED

    class LeanTrainer(DataParallelTrainer):
        # Should Ray rename what is overridden here, all that is lost is the time it takes.
        def _create_default_callbacks(self) -> list[Any]:
            return [each for each in super()._create_default_callbacks() if type(each).__name__ not in unused]

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            if alone and "scaling_policy" in parts:
                parts["scaling_policy"] = _without_autoscaler(self.scaling_config)
            return super()._initialize_and_run_controller(**parts)

    return LeanTrainer(
        work,
        train_loop_config=job,
        backend_config=_process_group(gpus) if workers > 1 else None,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            # A name of its own for every fit: Ray's snapshot of another life is never read (it may be torn).
            name=f"claim-{job['generation']}" + (f".{number}" if number else ""),
            storage_path=str(Path(job["run_dir"]) / ".ray"),
            failure_config=ray.train.FailureConfig(max_failures=WORKER_RESTARTS),
        ),
    )


def _without_autoscaler(scaling_config: Any) -> Any:
    """As many workers as configured, without the actor that would ask for more nodes: this machine has what it has."""
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class OnThisMachine(FixedScalingPolicy):
        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    return OnThisMachine(scaling_config)


def _process_group(gpus: int) -> Any:
    from ray.train.torch import TorchConfig

    return TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo")


class Fit(threading.Thread):
    """Ray Train's blocking `fit` on a thread, so that the main thread keeps the signals and the terminal."""

    def __init__(self, job: dict[str, Any], workers: int, share: Resources, number: int = 0):
        super().__init__(name="ray-train", daemon=True)
        self.job, self.workers, self.share, self.number = job, workers, share, number
        self.error: BaseException | None = None

    def run(self) -> None:
        from orchestrator.worker import work

        try:
            build_trainer(
                work,
                self.job,
                workers=self.workers,
                cpus=self.share.cpus,
                gpus=self.share.gpus,
                number=self.number,
            ).fit()
        except Exception as error:  # the driver decides, by the outcome the workers wrote
            self.error = error
