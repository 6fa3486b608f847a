"""What is trained for: an objective turns a batch into a loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from trainers.config import Phase, RunConfig
from trainers.data.types import Batch

State = dict[str, Tensor]


@dataclass(frozen=True)
class Loss:
    total: Tensor
    """scalar with a graph: the loss summed over the scored targets, fp32 (float64 for a float64 model)"""
    state: State | None
    """the model's runtime state after the batch, not yet detached"""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """detached sums over the batch, on the device; empty unless asked for"""


@dataclass(frozen=True)
class Scores:
    """Each target on its own, for evaluation; no graph."""

    nll: Tensor
    """(rows, T): negative log-likelihood in nats, 0 where nothing is scored"""
    correct: Tensor
    """(rows, T) bool: the likeliest token is the target"""
    state: State | None


class Objective(Protocol):
    def loss(self, model: nn.Module, batch: Batch, state: State | None, *, with_metrics: bool = False) -> Loss:
        """What to differentiate for one micro-batch on the model's device."""
        ...

    def scores(self, model: nn.Module, batch: Batch, state: State | None) -> Scores:
        """How well each target is predicted, free of smoothing and other training devices."""
        ...


def build_objective(config: RunConfig, phase: Phase | None = None) -> Objective:
    """The objective of a phase of the run, or of a run whose phases do not differ in it."""
    from trainers.objectives.language_model import LanguageModel

    return LanguageModel(label_smoothing=(phase or config).optim.label_smoothing)
