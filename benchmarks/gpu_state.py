"""What a run on a GPU keeps: a continuation with the same bits, and a snapshot that is a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_rig import Rig, Tensors, at_least, differing, take_step, within
from benchmarks.measure import Figure
from benchmarks.workload import BlockContext
from trainers.config import RunConfig
from trainers.loop import train
from trainers.manifest import newest
from trainers.record import series
from trainers.snapshot import SnapshotBuffer

STEPS, HALF = 12, 6
FOREVER = 10**9


def exact_resume(rig: Rig) -> list[Figure]:
    """A run that was stopped and gone on with ends with the bits of one that was not."""
    figures: list[Figure] = []
    for name, settings in (("fp32", ()), ("bf16, dropout, accumulated", BF16)):
        config = rig.config("deterministic=true", f"budget.steps={STEPS}", "logging.every_steps=1", *settings)
        whole, halves = rig.folder / f"whole-{len(figures)}", rig.folder / f"halves-{len(figures)}"
        trained(config, whole, rig, FOREVER)
        stopped = trained(config, halves, rig, HALF)
        trained(config, halves, rig, FOREVER)
        one, other = (saved(folder) for folder in (whole, halves))
        figures += [
            within(f"{name}: step at which it was stopped, distance from {HALF}", abs(stopped - HALF), 0),
            within(f"{name}: tensors that differ", differing(one, other), 0),
            within(f"{name}: losses that differ", _different_losses(whole, halves), 0),
        ]
    return figures


BF16 = ("precision.compute=bf16", "model.dropout=0.1", "batch.micro_sequences=4")


def trained(config: RunConfig, folder: Path, rig: Rig, steps: int) -> int:
    """Go on with the run in `folder` for at most so many steps; the step where it stands."""
    ctx = BlockContext(folder, rig.cache)
    ctx.allow(steps)
    try:
        return train(config, ctx).step
    finally:
        ctx.close()


def saved(folder: Path) -> Tensors:
    """Weights and optimizer state of the newest checkpoint."""
    checkpoint = newest(folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == STEPS
    return {f"{stem}/{name}": t for stem in ("model", "optimizer") for name, t in checkpoint.load(stem).items()}


def _different_losses(one: Path, other: Path) -> int:
    ours, theirs = (series(folder / "metrics.jsonl", "train/loss") for folder in (one, other))
    assert len(ours) == len(theirs) == STEPS
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


def pinned_snapshot(rig: Rig) -> list[Figure]:
    """A snapshot holds the state of its moment in the host's pinned memory, whatever training does afterwards."""
    engine = rig.engine(rig.config())
    take_step(engine, rig.batch(0))
    live = {(file, name): tensor for file, part in engine.tensors().items() for name, tensor in part.items()}
    then = {_key(key): tensor.detach().to("cpu", copy=True) for key, tensor in live.items()}
    buffer: SnapshotBuffer[tuple[str, str]] = SnapshotBuffer()
    buffer.reserve(live)
    began = time.perf_counter()
    copies = buffer.copy(live)
    seconds = time.perf_counter() - began
    take_step(engine, rig.batch(1))
    if rig.cuda:
        torch.cuda.synchronize(rig.device)
    held = {_key(key): tensor for key, tensor in copies.items()}
    now = {_key(key): tensor.detach().cpu() for key, tensor in live.items()}
    engine.close()
    figures = [
        within("tensors that are not as they were", differing(then, held), 0),
        at_least("tensors that training has changed since", differing(held, now), 1),
        Figure("speed of the copy", buffer.size_bytes / seconds / 1e9, "GB/s"),
    ]
    if rig.cuda:
        figures.append(at_least("share of the copies in pinned memory", _pinned_share(list(copies.values())), 1))
    return figures


def _key(key: tuple[str, str]) -> str:
    return "/".join(key)


def _pinned_share(tensors: list[Tensor]) -> float:
    return sum(tensor.is_pinned() for tensor in tensors) / len(tensors)


STATE: tuple[Callable[[Rig], list[Figure]], ...] = (exact_resume, pinned_snapshot)
