"""The budget of a phase in steps: the one derivation that the plan, the loop and the display share. No torch."""

from __future__ import annotations

import math

from trainers.config import BudgetConfig, CheckpointConfig, EvaluationConfig, epochs_to_steps
from trainers.errors import ConfigError


def phase_steps(budget: BudgetConfig, *, tokens_per_step: int, steps_per_epoch: int | None) -> int:
    """Optimizer updates that `budget` pays for, at least one.

    A budget in tokens is rounded up to whole steps, one in epochs down (`trainers.config.epochs_to_steps`).
    `steps_per_epoch` is None for a stream, whose length nobody knows; epochs of it are refused with ConfigError.
    """
    assert tokens_per_step > 0
    if budget.steps is not None:
        return budget.steps
    if budget.tokens is not None:
        return math.ceil(budget.tokens / tokens_per_step)
    assert budget.epochs is not None  # BudgetConfig holds exactly one of the three
    if steps_per_epoch is None:
        raise ConfigError(
            f"budget.epochs={budget.epochs:g} counts passes over a corpus, but a streaming corpus has no known end: "
            f"set budget.steps or budget.tokens instead (one step is {tokens_per_step:,} tokens here)."
        )
    return epochs_to_steps(budget.epochs, steps_per_epoch)


def evaluation_interval(evaluation: EvaluationConfig, steps_per_epoch: int | None) -> int | None:
    """Updates between two evaluations; None: only at the end of a phase (epochs of a stream have no length)."""
    if evaluation.every_steps is not None:
        return evaluation.every_steps
    if evaluation.every_epochs is None or steps_per_epoch is None:
        return None
    return epochs_to_steps(evaluation.every_epochs, steps_per_epoch)


def reaches_multiple(tokens: int, *, every: int, tokens_per_step: int) -> bool:
    """Whether the step that brought the run to `tokens` crossed a multiple of `every`."""
    return tokens // every > (tokens - tokens_per_step) // every


def saving_interval(saving: CheckpointConfig, steps_per_epoch: int | None) -> int | None:
    """Updates of a phase between two saves by epochs; None: there are none (epochs of a stream have no length)."""
    if saving.every_epochs is None or steps_per_epoch is None:
        return None
    return epochs_to_steps(saving.every_epochs, steps_per_epoch)
