"""train(config, ctx): the page to read first.

A run is a list of phases; a phase is a count of steps; a step is a few micro-batches and one update. Between two
steps the loop logs, evaluates, saves and, when asked, stops. Whatever happens at step k is a function of the
configuration, the data and k, so a run that was interrupted ends with the same bits as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from trainers.config import ModelConfig, RunConfig
from trainers.context import RunContext
from trainers.data.types import Batch
from trainers.models import build_model
from trainers.phase import ActivePhase
from trainers.progress import Outcome
from trainers.run import Run
from trainers.seeds import stream_seed

Builder = Callable[[ModelConfig, int], nn.Module]


def train(config: RunConfig, ctx: RunContext, *, build: Builder = build_model) -> Outcome:
    """Run every phase of `config` from wherever the run's last checkpoint left it.

    Raises UserError for input that cannot be used, TrainingFailed where training cannot go on, and Superseded when
    a newer claim owns the run.
    """
    run = Run(config, ctx, build)
    try:
        run.restore()
        while run.progress.phase < len(run.phases):
            phase = run.open_phase()
            try:
                reason = run_phase(run, phase)
            finally:
                phase.loader.close()
            if reason is not None:
                return run.stop(phase, reason)
            run.close_phase(phase)
        return run.finish()
    finally:
        run.close()


def run_phase(run: Run, phase: ActivePhase) -> str | None:
    """Train one phase to its end; the reason, when it was asked to stop before."""
    progress, config = run.progress, run.config
    while progress.phase_step < phase.steps and not progress.phase_over:
        batches = phase.loader.micro_batches(progress.phase_step)
        targets, stop, save_due = run.agree(sum(batch.n_targets for batch in batches))
        if stop is not None:
            return stop
        if save_due:
            run.save(phase)

        loss = forward_backward(run, phase, batches, targets)
        lr = phase.lr(progress.phase_step)
        gradients = run.gradient_sizes() if progress.step == 0 else None
        update = run.engine.update(lr)
        progress.advance(targets)
        if gradients is not None:
            run.tell_census(phase, gradients)

        last = progress.phase_step == phase.steps
        evaluates = last or phase.evaluates_after(progress.phase_step, progress.step)
        logs = evaluates or progress.step % config.logging.every_steps == 0
        if logs:
            run.log_step(phase, loss, targets, lr, update)
        trouble = run.watch(phase, update, batches, logging=logs)
        best = run.evaluate(phase) if evaluates else False
        if best or last or progress.phase_over or phase.saves_after(progress.phase_step, progress.step, evaluates):
            run.save(phase, best=best)
        if evaluates:
            run.report()
        if trouble is not None:
            return trouble
    return None


def forward_backward(run: Run, phase: ActivePhase, batches: list[Batch], targets: int) -> torch.Tensor:
    """Accumulate the gradients of one step; this rank's summed loss (a scalar on the device, not yet read)."""
    total: torch.Tensor | None = None
    for index, batch in enumerate(batches):
        if phase.draws_noise:
            torch.manual_seed(stream_seed(run.config.seed, "dropout", run.progress.step, index, run.rank))
        with run.engine.micro_batch(last=index == len(batches) - 1) as model:
            loss = run.objective.loss(model, run.to_device(batch), run.streams.enter(index, batch))
            run.engine.backward(run.engine.normalise(loss.total, targets))
        run.streams.leave(index, loss.state)
        summed = loss.total.detach()
        total = summed if total is None else total + summed
    assert total is not None
    return total
