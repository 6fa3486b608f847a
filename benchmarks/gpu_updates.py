"""What an update on a GPU does: recomputed, compiled, accumulated, left out where not finite, never waited for."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu_check import Skipped
from benchmarks.gpu_rig import (
    LR,
    Rig,
    Tensors,
    apart,
    at_least,
    copied,
    differing,
    distance,
    gradients,
    take_step,
    within,
)
from benchmarks.measure import Figure
from benchmarks.workload import OurLoop, our_loop
from trainers.config import RunConfig
from trainers.engines import Engine

SAME = 1e-5  # relative: the same sums in another order
QUIET_STEPS = 9  # between two that log


def recomputed_gradients(rig: Rig) -> list[Figure]:
    """Activation checkpointing gives the same gradients, dropout and all."""
    settings = ("model.dropout=0.1", "deterministic=true")
    plain, again = (
        _gradients(rig, rig.config(*settings, f"model.activation_checkpointing={switch}"))
        for switch in ("false", "true")
    )
    figures = [within("gradients, largest relative difference of a tensor", _largest(again[0], plain[0]), SAME)]
    if rig.cuda:
        figures.append(Figure("memory of the step, recomputed / kept", again[1] / plain[1], "x", bar=1.0))
    return figures


def _gradients(rig: Rig, config: RunConfig) -> tuple[Tensors, int]:
    """Those of the first step, and what it took of the device's memory at most."""
    engine, batch = rig.engine(config), rig.batch(0)
    before = _reset_peak(rig)
    torch.manual_seed(3)  # of the masks
    gradients(engine, batch, batch.n_targets)
    peak = torch.cuda.max_memory_allocated(rig.device) - before if rig.cuda else 0
    return _gradients_of(engine), peak


def _reset_peak(rig: Rig) -> int:
    """What is allocated now, from which on the peak counts."""
    if not rig.cuda:
        return 0
    torch.cuda.reset_peak_memory_stats(rig.device)
    return torch.cuda.memory_allocated(rig.device)


def _gradients_of(engine: Engine) -> Tensors:
    found = {name: parameter.grad for name, parameter in engine.module.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def _largest(ours: Tensors, theirs: Tensors) -> float:
    assert ours.keys() == theirs.keys() and theirs
    return max(distance(ours[name], theirs[name]) for name in theirs)


def compiled_losses(rig: Rig) -> list[Figure]:
    """A compiled model has the losses of an eager one, but for rounding."""
    if rig.cuda and importlib.util.find_spec("triton") is None:
        raise Skipped("torch.compile needs the package triton on CUDA")
    if not rig.cuda and not any(shutil.which(compiler) for compiler in ("g++", "clang++")):
        raise Skipped("torch.compile needs a C++ compiler on the CPU")
    steps = 3 if rig.tiny else 10
    losses = rig.losses(rig.config("compile=true"), steps)
    figures = [within("fp32: losses, largest relative difference to eager", apart(losses, rig.plain[:steps]), 1e-4)]
    if not rig.tiny:  # a second compilation
        settings = ("precision.compute=bf16",)
        eager, compiled = (rig.losses(rig.config(*settings, *more), steps) for more in ((), ("compile=true",)))
        figures.append(within("bf16: the same", apart(compiled, eager), 0.01))
    return figures


def accumulated_gradients(rig: Rig) -> list[Figure]:
    """Four micro-batches add up to the gradients of one, and to the same norm before clipping."""
    batch = rig.batch(0)
    found, norms = [], []
    for micro in (len(batch.tokens), len(batch.tokens) // 4):
        engine = rig.engine(rig.config())
        gradients(engine, batch, batch.n_targets, micro=micro)
        found.append(_gradients_of(engine))
        norms.append(float(engine.update(LR).grad_norm))
        engine.close()
    return [
        within("gradients, largest relative difference of a tensor", _largest(found[1], found[0]), SAME),
        within("norm, relative difference", apart(norms[1:], norms[:1]), SAME),
    ]


# ---- updates that are left out -------------------------------------------------------------------------------


def nonfinite_update(rig: Rig) -> list[Figure]:
    """A loss that is not finite leaves weights and moments as they were, is counted, and the host waits for nothing."""
    figures = []
    for what, settings in (("fp32", ()), ("bf16 weights", ("precision.compute=bf16", "precision.bf16_weights=true"))):
        figures += [_named(what, figure) for figure in _left_out(rig, *settings)]
    return figures


def _named(what: str, figure: Figure) -> Figure:
    return Figure(f"{what}: {figure.what}", figure.value, figure.unit, bar=figure.bar, at_least=figure.at_least)


def _left_out(rig: Rig, *settings: str) -> list[Figure]:
    engine = rig.engine(rig.config(*settings))
    batches = [rig.batch(step) for step in range(4)]
    for batch in batches[:2]:
        take_step(engine, batch)
    before = copied(engine)
    with never_waiting(rig):
        take_step(engine, batches[2], factor=float("nan"))
    after = copied(engine)
    rounds = {name for name in before if name.split("/")[1] == "rounds"}  # counts the updates that were drawn for
    kept = [{name: each[name] for name in each if name not in rounds} for each in (before, after)]
    counted = engine.skipped.take_longest(), engine.skipped.total()
    take_step(engine, batches[3])
    moved = differing(after, copied(engine))
    engine.close()
    return [
        within("tensors changed by the bad update", differing(*kept), 0),
        within("incidents counted, distance from one", abs(counted[0] - 1) + abs(counted[1] - 1), 0),
        at_least("tensors changed by the next update", moved, 1),
    ]


@contextmanager
def never_waiting(rig: Rig) -> Iterator[None]:
    """Inside, whatever makes the host wait for a CUDA device raises RuntimeError; other devices it may wait for."""
    if not rig.cuda:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the loop ---------------------------------------------------------------------------------------------------


def quiet_steps(rig: Rig) -> list[Figure]:
    """In steps that do not log, the whole loop never waits for the device."""
    if not rig.cuda:
        raise Skipped("torch counts the host's waits for CUDA devices only")
    figures = []
    for compute in ("fp32", "bf16"):
        with our_loop(rig.config(f"precision.compute={compute}"), rig.folder / f"waits-{compute}") as ours:
            ours.steps(10)
            waits = host_waits(ours)
        figures.append(within(f"{compute}: waits in {QUIET_STEPS} steps", len(waits), 0))
        if waits:
            raise AssertionError(f"the host waited at {', '.join(sorted(set(waits)))}")
    return figures


def host_waits(ours: OurLoop) -> list[str]:
    """Where the host waited for the device in steps that do not log, each time, as torch itself notes it.

    The run stands behind a logged step.
    """
    assert ours.run.progress.step % 10 == 0, "begin behind a logged step"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            ours.steps(QUIET_STEPS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits]


UPDATES: tuple[Callable[[Rig], list[Figure]], ...] = (
    *(recomputed_gradients, accumulated_gradients, nonfinite_update, quiet_steps, compiled_losses),
)
