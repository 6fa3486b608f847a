"""How far a run has come: the small numbers a checkpoint needs beside the tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from trainers.config import EarlyStoppingConfig


@dataclass
class Progress:
    """Counts over the whole run, and the standing of early stopping in the present phase."""

    step: int = 0
    """optimizer updates done, over all phases"""
    tokens: int = 0
    """targets trained on, over all phases and ranks"""
    phase: int = 0
    """index of the present phase"""
    phase_step: int = 0
    phase_over: bool = False
    """early stopping ended the present phase before its budget"""
    best: float | None = None
    """best evaluation of the present phase"""
    reference: float | None = None
    """the evaluation that later ones must beat by min_delta"""
    evaluations_without_improvement: int = 0
    last: dict[str, float] = field(default_factory=dict)
    """newest value of each metric, for the closing table"""

    def advance(self, targets: int) -> None:
        self.step += 1
        self.phase_step += 1
        self.tokens += targets

    def next_phase(self) -> None:
        self.phase += 1
        self.phase_step = 0
        self.phase_over = False
        self.best = None
        self.reference = None
        self.evaluations_without_improvement = 0

    def judge(self, metrics: dict[str, float], rule: EarlyStoppingConfig) -> bool:
        """Take in an evaluation; True when it is the best of the phase so far."""
        value = metrics[rule.metric]
        best = _better(value, self.best, rule.mode, 0.0)
        if best:
            self.best = value
        if _better(value, self.reference, rule.mode, rule.min_delta):
            self.reference = value
            self.evaluations_without_improvement = 0
        else:
            self.evaluations_without_improvement += 1
        self.phase_over = 0 < rule.patience <= self.evaluations_without_improvement
        return best

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "last": dict(self.last)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Progress:
        return Progress(**data)


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    state: str
    """finished | stopped | failed"""
    reason: str
    """completed, early_stopping, nonfinite, or what asked for the stop"""
    step: int
    tokens: int
    metrics: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _better(value: float, than: float | None, mode: str, by: float) -> bool:
    """Whether `value` beats `than` by more than `by`; a NaN beats nothing."""
    if math.isnan(value):
        return False
    if than is None:
        return True
    return value < than - by if mode == "min" else value > than + by
