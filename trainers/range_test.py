"""range_test: a learning-rate sweep on a live run, which it leaves as it found it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from trainers.data.loader import build_loader
from trainers.data.types import Loader
from trainers.loop import forward_backward
from trainers.lr_curve import DIVERGENCE, Ending, LrCurve, smoothing_window
from trainers.phase import ActivePhase
from trainers.run import Run
from trainers.seeds import restore_rng, rng_tensors

OnStep = Callable[[int, float, float], None]
"""called with the number of updates made, the rate of the last one, and the loss after it"""


def range_test(
    run: Run, phase: ActivePhase, lrs: Sequence[float], *, on_step: OnStep = lambda step, lr, loss: None
) -> LrCurve:
    """The loss after one update at each of the rising `lrs`, from where the run stands, on the batches ahead of it.

    Ends at the first loss that is not finite or beyond four times the lowest smoothed one, and where the run is asked
    to stop. Whatever ends it, an exception too, the run goes on afterwards with the bits it would have had without:
    weights, moments, loss scale, counters, streams, position and random generators are put back. A function of the
    configuration and the run's state, so the same run gives the same bits again. Call it between two steps; a
    collective where there are several workers. Takes memory for a copy of weights and moments on the CPU, and for
    two numbers a step.
    """
    with as_found(run), own_loader(run, phase) as loader:
        return sweep(run, phase, loader, lrs, on_step)


def sweep(run: Run, phase: ActivePhase, loader: Loader, lrs: Sequence[float], on_step: OnStep) -> LrCurve:
    """The range test itself, which leaves the run trained by it."""
    losses = Losses(smoothing_window(len(lrs)))
    for index in range(len(lrs) + 1):  # the batch after the last update shows what that did
        batches = loader.micro_batches(run.progress.phase_step)
        targets, stop, _ = run.agree(sum(batch.n_targets for batch in batches))
        if stop is not None:
            return losses.curve(lrs, "stopped", None, stop)
        loss = forward_backward(run, phase, batches, targets)
        (total,) = run.peers.sum((loss.item(),))
        ended = losses.take(total / targets)
        if index:
            on_step(index, lrs[index - 1], total / targets)
        if ended is not None:
            return losses.curve(lrs, ended, lrs[index - 1] if index else None)
        if index < len(lrs):
            update = run.engine.update(lrs[index])
            run.progress.advance(targets)
            if run.engine.scaler is None and bool(update.skipped):  # under fp16 an overflow only seeks the scale
                return losses.curve(lrs, "nonfinite", lrs[index])
    return losses.curve(lrs, "completed", None)


class Losses:
    """The losses of a sweep as they come, and when they are reason to end it."""

    def __init__(self, window: int):
        self._window = window
        self._first = math.nan
        self._after: list[float] = []
        """after each update"""
        self._best = math.inf
        """the lowest mean of `window` losses in a row so far, of fewer at the start"""

    def take(self, loss: float) -> Ending | None:
        """Keep one more loss, the first before any update; how it ends the sweep, where it does."""
        if not math.isfinite(loss):
            return "nonfinite"
        if math.isnan(self._first):
            self._first = self._best = loss
            return None
        self._after.append(loss)
        if loss > DIVERGENCE * self._best:
            return "diverged"
        recent = self._after[-self._window :]
        self._best = min(self._best, sum(recent) / len(recent))
        return None

    def curve(self, lrs: Sequence[float], ended: Ending, at: float | None, why: str = "") -> LrCurve:
        after = tuple(self._after)
        return LrCurve(tuple(lrs[: len(after)]), after, self._first, self._window, ended, at, why)


@contextmanager
def as_found(run: Run) -> Iterator[None]:
    """Whatever the body trains, the run is afterwards what it was, bit for bit. Only between two steps."""
    engine, progress = run.engine, run.progress
    tensors = {
        file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
        for file, named in engine.tensors().items()
    }
    state, rates = engine.state(), [group["lr"] for group in engine.optimizer.param_groups]
    streams = {name: tensor.clone() for name, tensor in run.streams.tensors().items()}
    random = rng_tensors()
    run.progress = copy.deepcopy(progress)  # whoever holds the run's own keeps it untouched
    try:
        yield
    finally:
        run.progress = progress
        engine.load(tensors, state, optimizer=True)
        for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        run.streams.load(streams)
        restore_rng(random)


@contextmanager
def own_loader(run: Run, phase: ActivePhase) -> Iterator[Loader]:
    """A second loader of the phase, at the place of its own: a stream cannot be read backwards."""
    loader = build_loader(run.config, phase.spec, phase.data, run.rank, run.ctx.world_size)
    try:
        loader.restore(phase.loader.state())
        yield loader
    finally:
        loader.close()
