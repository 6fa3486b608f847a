"""SweepResults: what a sweep found, as the MLflow store has it, in plain values that can be ranked, drawn and told."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from orchestrator.sweeps.history import trial_name
from orchestrator.sweeps.settings import Objective

FAILED = ("nonfinite", "oom", "error")
"""endings without an objective: the searcher was told a penalty"""
STOPPED = ("asha", "hyperband", "median")
"""stopped early by the scheduler, with the value of the last evaluation"""
UNENDED = ("running", "waiting")

Curve = tuple[tuple[int, float], ...]
"""(tokens, value) in the order of tokens"""


@dataclass(frozen=True)
class TrialResult:
    """One training: a point of the space with one seed. What the store does not say is NaN, empty or 0."""

    name: str
    point: int
    seed_index: int
    state: str
    """how it ended (completed, asha, ..., error), or running or waiting"""
    segment: int = 0
    """how often it took over from another member of its population"""
    params: Mapping[str, Any] = field(default_factory=dict)
    """dotted path -> value as searched"""
    config: Mapping[str, str] = field(default_factory=dict)
    """dotted path -> value of the whole resolved configuration, as text"""
    objectives: tuple[float, ...] = ()
    """what the searcher was told of the point, the first being the one that ranks"""
    curve: Curve = ()
    """of the first objective's metric"""
    tokens: int = 0
    tokens_per_s: float = float("nan")
    """the median of what was logged"""
    peak_gib: float = float("nan")
    train_s: float = 0.0
    end_s: float | None = None
    """seconds since the epoch"""
    precision: str = ""
    """as searched, such as int8; else the arithmetic it computed in"""
    run_id: str = ""
    run_path: str = ""

    @property
    def told(self) -> tuple[float, ...]:
        """The objectives, none for a trial that failed or has told none yet."""
        return () if self.state in FAILED else self.objectives


@dataclass(frozen=True)
class PointResult:
    """A point of the space with all its seeds."""

    number: int
    trials: tuple[TrialResult, ...]
    """by seed, at least one"""

    @property
    def name(self) -> str:
        return trial_name(self.number)

    @property
    def params(self) -> Mapping[str, Any]:
        return self.trials[0].params

    @property
    def config(self) -> Mapping[str, str]:
        return self.trials[0].config

    @property
    def precision(self) -> str:
        return self.trials[0].precision

    @cached_property
    def state(self) -> str:
        """One word for all seeds: a failure first, then what is still going on, then why one was stopped."""
        states = [trial.state for trial in self.trials]
        order = (*FAILED, *UNENDED)
        return min(states, key=lambda state: (order.index(state) if state in order else 9, state == "completed"))

    @property
    def failed(self) -> bool:
        return self.state in FAILED

    @property
    def ended(self) -> bool:
        return self.state not in UNENDED

    @cached_property
    def told(self) -> tuple[float, ...]:
        """The objectives, each the mean over the seeds that told one; empty where none did, or one failed."""
        told = [trial.told for trial in self.trials if trial.told]
        if self.failed or not told:
            return ()
        return tuple(statistics.fmean(values) for values in zip(*told, strict=False))

    @property
    def mean(self) -> float | None:
        """The first objective."""
        return self.told[0] if self.told else None

    @cached_property
    def spread(self) -> float | None:
        """Sample standard deviation (n - 1) of `values`; None for fewer than two."""
        values = self.values
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def values(self) -> tuple[float, ...]:
        """The first objective of each seed, at the last evaluation that all of them had."""
        if self.failed:
            return ()
        if self.curve:
            return tuple(dict(trial.curve)[self.curve[-1][0]] for trial in self.trials)
        return tuple(trial.told[0] for trial in self.trials if trial.told)

    @cached_property
    def curve(self) -> Curve:
        """The mean over the seeds at the tokens where every seed was evaluated."""
        curves = [dict(trial.curve) for trial in self.trials]
        common = set(curves[0]).intersection(*curves[1:])
        return tuple((at, statistics.fmean(curve[at] for curve in curves)) for at in sorted(common))

    @property
    def tokens(self) -> int:
        """That each seed has trained on; the least of them."""
        return min(trial.tokens for trial in self.trials)

    @property
    def tokens_per_s(self) -> float | None:
        return _mean(trial.tokens_per_s for trial in self.trials)

    @property
    def peak_gib(self) -> float | None:
        known = [trial.peak_gib for trial in self.trials if trial.peak_gib == trial.peak_gib]
        return max(known, default=None)

    @property
    def train_s(self) -> float:
        return sum(trial.train_s for trial in self.trials)

    @property
    def end_s(self) -> float | None:
        """When the last seed ended; None while one has not."""
        ends = [trial.end_s for trial in self.trials if trial.end_s is not None]
        return max(ends) if self.ended and len(ends) == len(self.trials) else None


@dataclass(frozen=True)
class SweepResults:
    """A sweep: its settings, its points by number, and what it cost."""

    name: str
    state: str
    """running, finished, stopped or failed"""
    points: tuple[PointResult, ...] = ()
    objectives: tuple[Objective, ...] = (Objective(),)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """SweepSettings as JSON; empty where the store has none that can be read"""
    preset: str = ""
    stop_reason: str = ""
    best: int | None = None
    """the number of the point that the sweep itself names its best"""
    command: str = ""
    """that uses the winner, ready to paste"""
    lineage: str = ""
    """how the weights of a population's winner came about, in a sentence"""
    taken_out: tuple[tuple[str, str], ...] = ()
    """(cell, reason)"""
    slots: int = 1
    wall_s: float = 0.0
    train_s: float = 0.0
    tokens: int = 0
    notes: tuple[str, ...] = ()
    """what could not be read, in sentences"""

    @property
    def running(self) -> bool:
        return self.state == "running"

    @property
    def objective(self) -> Objective:
        """The one that ranks."""
        return self.objectives[0]

    @cached_property
    def ranked(self) -> tuple[PointResult, ...]:
        """The points that ended with a value, the best first; equals in the order of their numbers."""
        valued = [point for point in self.points if point.ended and point.mean is not None]
        return tuple(sorted(valued, key=lambda point: (self.objective.sign * (point.mean or 0.0), point.number)))

    @property
    def unranked(self) -> tuple[PointResult, ...]:
        """Those without: going on, or failed."""
        ranked = {point.number for point in self.ranked}
        return tuple(point for point in self.points if point.number not in ranked)

    @cached_property
    def winner(self) -> PointResult | None:
        """What the sweep names its best; else the best that completed; else the best there is."""
        named = [point for point in self.ranked if point.number == self.best]
        completed = [point for point in self.ranked if point.state == "completed"]
        return next(iter((*named, *completed, *self.ranked)), None)

    @property
    def paths(self) -> tuple[str, ...]:
        """What was searched, in the order of the space."""
        return tuple(dict.fromkeys(path for point in self.points for path in point.params))


def _mean(values: Iterable[float]) -> float | None:
    known = [value for value in values if value == value]
    return statistics.fmean(known) if known else None
