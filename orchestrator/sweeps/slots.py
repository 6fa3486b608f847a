"""Slots: how many trials the cluster trains at a time, and what each gets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from orchestrator.experiment import SWEEP, confined
from orchestrator.ray_cluster import Resources, free_cpus, ray_cluster, usable_cpus
from orchestrator.sweeps.sweep import Sweep, SweepRequest
from search_spaces.precisions import Device
from trainers.config import RunConfig
from trainers.errors import UserError
from trainers.identity import read_json

# Of a trial whose workers are actors of their own: it needs no CPU, and Tune wants a bundle that is not empty. The head
# is also the node that nobody takes away.
DRIVER = {"node:__internal_head__": 0.001}


@dataclass(frozen=True)
class Slots:
    count: int
    resources: dict[str, float]
    """of the trial's own process"""
    share: dict[str, int]
    """of each worker, where a trial has several"""
    gpus_per_trial: float


def device_of(base: RunConfig, request: SweepRequest) -> Device:
    """What the trials compute on: the configured device; of a sweep that was begun, the one it was begun for; else what
    there is where they will run, the cluster that RAY_ADDRESS names or this machine.

    Raises UserError where a cluster cannot be asked.
    """
    if base.device != "auto":
        return base.device
    if request.name is not None and not request.fresh:
        begun = read_json(confined(request.runs_dir, request.name) / SWEEP) or {}
        if begun.get("device") in get_args(Device):
            return begun["device"]
    if os.environ.get("RAY_ADDRESS"):
        with asked_cluster(base.workers) as ray:
            return _device_there(ray, base, request)
    from trainers.devices import resolve_device

    return resolve_device("auto").type  # type: ignore[return-value]


@contextlib.contextmanager
def asked_cluster(workers: int) -> Iterator[Any]:
    """The cluster that RAY_ADDRESS names, to be asked what it has. Raises UserError where it does not answer."""
    try:
        with ray_cluster(workers, verbose=False, log_path=Path(os.devnull)) as ray:
            yield ray
    except ConnectionError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the Ray cluster that RAY_ADDRESS names cannot be asked what it has: {first}") from error


def _device_there(ray: Any, base: RunConfig, request: SweepRequest) -> Device:
    """cuda where the cluster has the GPUs of a trial."""
    gpus = ray.cluster_resources().get("GPU", 0)
    needed = base.workers if request.gpus_per_trial is None else request.gpus_per_trial
    return "cuda" if gpus and gpus >= needed else "cpu"


def starts_ahead(sweep: Sweep, request: SweepRequest) -> bool:
    """Whether the trials will use about a process for each CPU of a local cluster: few are started in vain."""
    if os.environ.get("RAY_ADDRESS") or sweep.device != "cpu" or sweep.base.workers > 1:
        return False
    cpus, settings = usable_cpus(), sweep.settings
    at_a_time = min(cpus // settings.cpus_per_trial, request.concurrent or cpus, settings.trials)
    return 2 * at_a_time >= cpus


def check_fits_here(workers: int, cpus_per_trial: int) -> None:
    """UserError where a trial could never be placed on this machine; a cluster that is joined is asked later."""
    if not os.environ.get("RAY_ADDRESS"):
        trials_that_fit([max(workers, usable_cpus())], workers, cpus_per_trial)


def trials_that_fit(nodes: Sequence[int], workers: int, each: int) -> int:
    """How many trials the free CPUs of these nodes hold at a time, a worker with all of its `each` on one node.

    Raises UserError where that is none.
    """
    fit = sum(node // each for node in nodes) // workers
    if fit == 0:
        there = f"and there are {sum(nodes)}"
        if len(nodes) > 1:
            there = f"each worker's on one node, {there} on {len(nodes)} nodes, the largest of which has {max(nodes)}"
        raise UserError(
            f"a trial of {workers} worker{'s' if workers > 1 else ''} with {each} CPUs each needs {workers * each}, "
            f"{there}: it could never start. Lower --cpus-per-trial or --workers."
        )
    return fit


def slots_of(ray: Any, sweep: Sweep, request: SweepRequest) -> Slots:
    """What the real cluster allows. Raises UserError where a trial could never be placed."""
    gpus = float(ray.cluster_resources().get("GPU", 0))
    workers, each = sweep.base.workers, sweep.settings.cpus_per_trial
    wanted = request.gpus_per_trial
    per_trial = (float(workers) if sweep.device == "cuda" else 0.0) if wanted is None else wanted
    fit = trials_that_fit(free_cpus(ray), workers, each)
    if per_trial > gpus:
        raise UserError(
            f"a trial needs {per_trial:g} GPUs and the cluster has {gpus:g}: it could never start. "
            f"{_fewer_gpus(wanted, gpus)}"
        )
    if workers > 1 and per_trial and per_trial != workers:
        raise UserError(f"a trial of {workers} workers takes a GPU each: leave --gpus-per-trial {per_trial:g} out.")
    if per_trial:
        fit = min(fit, int(gpus / per_trial + 1e-9))
    count = min(fit, request.concurrent or fit)
    if workers == 1:
        resources: dict[str, float] = {"CPU": each, **({"GPU": per_trial} if per_trial else {})}
        return Slots(count, resources, {}, per_trial)
    share = Resources(each, int(per_trial > 0), int(gpus))
    return Slots(count, DRIVER, asdict(share), per_trial)


def _fewer_gpus(wanted: float | None, gpus: float) -> str:
    """The way out, where a trial asks for `wanted` GPUs (None: one for each worker) of fewer."""
    if wanted is None:
        return "Say --device cpu, or --gpus-per-trial 0.5 for two trials on a GPU."
    if gpus:
        return "Lower --gpus-per-trial (a fraction shares one GPU)."
    return "Leave --gpus-per-trial out, and say --device cpu."
