"""Slots: how many trials the cluster trains at a time, and what each gets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.ray_cluster import Resources
from orchestrator.sweeps.sweep import Sweep, SweepRequest
from trainers.errors import UserError

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


def slots_of(ray: Any, sweep: Sweep, request: SweepRequest) -> Slots:
    """What the real cluster allows. Raises UserError where a trial could never be placed."""
    total = ray.cluster_resources()
    cpus, gpus = float(total.get("CPU", 0)), float(total.get("GPU", 0))
    workers, each = sweep.base.workers, sweep.settings.cpus_per_trial
    wanted = request.gpus_per_trial
    per_trial = (float(workers) if sweep.device == "cuda" else 0.0) if wanted is None else wanted
    if workers * each > cpus:
        raise UserError(
            f"a trial of {workers} worker{'s' if workers > 1 else ''} with {each} CPUs each needs {workers * each}, "
            f"and the cluster has {cpus:g}: it could never start. Lower --cpus-per-trial or --workers."
        )
    if per_trial > gpus:
        raise UserError(
            f"a trial needs {per_trial:g} GPUs and the cluster has {gpus:g}: it could never start. "
            "Lower --gpus-per-trial (a fraction shares one GPU), or say --device cpu."
        )
    if workers > 1 and per_trial and per_trial != workers:
        raise UserError(f"a trial of {workers} workers takes a GPU each: leave --gpus-per-trial {per_trial:g} out.")
    fit = int(cpus // (workers * each))
    if per_trial:
        fit = min(fit, int(gpus / per_trial + 1e-9))
    count = min(fit, request.concurrent or fit)
    if workers == 1:
        resources: dict[str, float] = {"CPU": each, **({"GPU": per_trial} if per_trial else {})}
        return Slots(count, resources, {}, per_trial)
    share = Resources(each, int(per_trial > 0), int(gpus))
    return Slots(count, DRIVER, asdict(share), per_trial)
