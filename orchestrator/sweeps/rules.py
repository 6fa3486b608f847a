"""Early-stopping rules: whether a trial that has just been evaluated goes on.

A rule is a function of its settings and the history, so it decides the same when the history is replayed. It decides on
the mean over a point's seeds, which is what the history holds, once for each point and rung. A value that is not
finite ends a trial under every rule. At the full budget there is nothing left to stop.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from orchestrator.sweeps.draws import generator
from orchestrator.sweeps.history import History, Seen, StopReason, Trial
from orchestrator.sweeps.settings import SweepSettings
from search_spaces.space import Space
from search_spaces.trial import SHARE
from trainers.errors import ConfigError

MIN_SAMPLES = 3
"""trials that the median is taken of, at least"""


class Rule(Protocol):
    def stops(self, history: History, number: int, seen: Seen) -> StopReason | None:
        """Why trial `number` ends here, None where it goes on. `seen` is its last evaluation in the history."""


def default_scheduler(space: Space) -> str:
    """The scheduler where nobody names one: asha, or none where no two trials may be compared before their ends."""
    return "none" if _shares(space) else "asha"


def check_rule(space: Space, scheduler: str) -> None:
    """ConfigError where trials would be compared on different texts: each phase scores its own held-out text, and where
    the shares of phases are searched, trials of equal tokens are in different phases."""
    shares = _shares(space)
    if shares and scheduler != "none":
        raise ConfigError(
            f"scheduler={scheduler} compares trials at equal tokens, where {', '.join(shares)} has them in different "
            "phases, each of which scores its own text: say --scheduler none."
        )


def _shares(space: Space) -> list[str]:
    return [path for path in space if SHARE.fullmatch(path)]


def build_rule(settings: SweepSettings) -> Rule:
    """The rule of a sweep. Population based training stops nothing by a rule."""
    sign, budget = settings.objective.sign, settings.tokens
    grace = settings.report_every if settings.grace is None else settings.grace
    match settings.scheduler:
        case "asha":
            return Asha(rungs(grace, settings.reduction, budget), budget, settings.reduction, sign)
        case "hyperband":
            return Hyperband(rungs(grace, settings.reduction, budget), budget, settings.reduction, sign, settings.seed)
        case "median":
            return Median(grace, budget, sign)
        case "none" | "pbt":
            return NoRule()


def rungs(grace: int, reduction: int, budget: int) -> tuple[int, ...]:
    """grace * reduction^k tokens, those below the budget."""
    found = []
    while grace < budget:
        found.append(grace)
        grace *= reduction
    return tuple(found)


@dataclass(frozen=True)
class NoRule:
    """Stops a trial whose value is not finite, and no other."""

    def stops(self, history: History, number: int, seen: Seen) -> StopReason | None:
        return None if _finite(seen) else "nonfinite"


# ---- successive halving ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asha:
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) in the form that stops and never pauses.

    A trial goes on if its value at a rung is within the best 1/reduction of those recorded there before it. As
    ray.tune.schedulers.AsyncHyperBandScheduler(stop_last_trials=False) decides: the second trial at a rung is judged
    already, and an evaluation that passes several rungs at once counts at the highest of them alone.
    """

    rungs: tuple[int, ...]
    """tokens, rising"""
    budget: int
    reduction: int
    sign: float
    """multiplied with it, less is better"""

    def stops(self, history: History, number: int, seen: Seen) -> StopReason | None:
        if not _finite(seen):
            return "nonfinite"
        others = (trial for trial in history.trials.values() if trial.number != number)
        return "asha" if self.is_behind(history.trials[number], seen, others) else None

    def is_behind(self, trial: Trial, seen: Seen, others: Iterable[Trial]) -> bool:
        """Whether `seen` is the value of `trial` at a rung, and not good enough among those of `others` there."""
        if seen.tokens >= self.budget:
            return False
        start, end = self._rung(seen.tokens)
        if _first(trial, start, end) != seen:  # judged at this rung before, or below the lowest
            return False
        recorded = [at for other in others if (at := _first(other, start, end)) and _finite(at)]
        return bool(recorded) and self._reward(seen) < self._cutoff(recorded)

    def _rung(self, tokens: int) -> tuple[int, int]:
        """The highest rung that so many tokens have reached, and the next one; (0, 0) below the lowest."""
        index = bisect_right(self.rungs, tokens)
        return (self.rungs[index - 1], (*self.rungs, self.budget)[index]) if index else (0, 0)

    def _cutoff(self, recorded: list[Seen]) -> float:
        import numpy as np

        return float(np.percentile([self._reward(seen) for seen in recorded], (1 - 1 / self.reduction) * 100))

    def _reward(self, seen: Seen) -> float:
        return -self.sign * seen.values[0]


@dataclass(frozen=True)
class Hyperband:
    """Successive halving in brackets, each of which begins a rung later than the one before; asynchronous, as Ray's
    `brackets`. A trial is compared with those of its bracket.

    Li et al. 2018 (arXiv:1603.06560). The share of a bracket falls by e with each rung fewer, as in Ray; the bracket of
    trial n is a function of (seed, n).
    """

    rungs: tuple[int, ...]
    budget: int
    reduction: int
    sign: float
    seed: int

    def stops(self, history: History, number: int, seen: Seen) -> StopReason | None:
        if not _finite(seen):
            return "nonfinite"
        if not self.rungs:
            return None
        bracket = self.bracket(number)
        others = (
            trial
            for trial in history.trials.values()
            if trial.number != number and self.bracket(trial.number) == bracket
        )
        asha = Asha(self.rungs[bracket:], self.budget, self.reduction, self.sign)
        return "hyperband" if asha.is_behind(history.trials[number], seen, others) else None

    def bracket(self, number: int) -> int:
        """How many of the first rungs trial `number` is not judged at."""
        return _bracket(self.seed, number, len(self.rungs))


@cache
def _bracket(seed: int, number: int, brackets: int) -> int:
    weights = [math.exp(-bracket) for bracket in range(brackets)]
    return generator("bracket", seed, number).choices(range(brackets), weights)[0]


# ---- the median rule ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Median:
    """Median stopping (Golovin et al. 2017, Google Vizier, section 3.2.2).

    A trial ends if its best value so far is worse than the median of the other trials' running means up to as many
    tokens; at least three trials must have come so far. As ray.tune.schedulers.MedianStoppingRule decides.
    """

    grace: int
    """tokens before which nothing is stopped, and evaluations do not count in a running mean"""
    budget: int
    sign: float

    def stops(self, history: History, number: int, seen: Seen) -> StopReason | None:
        if not _finite(seen):
            return "nonfinite"
        if not self.grace <= seen.tokens < self.budget:
            return None
        means = [self._running_mean(trial, seen.tokens) for trial in history.trials.values() if trial.number != number]
        finite = [mean for mean in means if math.isfinite(mean)]
        if len(finite) < MIN_SAMPLES:
            return None
        best = min(self.sign * at.values[0] for at in history.trials[number].seen)
        return "median" if best > _median(finite) else None

    def _running_mean(self, trial: Trial, tokens: int) -> float:
        """Of the values up to so many tokens; nan where the trial has not come so far."""
        if not trial.seen or trial.seen[-1].tokens < tokens:
            return math.nan
        values = [self.sign * seen.values[0] for seen in trial.seen if self.grace <= seen.tokens <= tokens]
        return sum(values) / len(values) if values else math.nan


# ---- values ---------------------------------------------------------------------------------------------


def _finite(seen: Seen) -> bool:
    return all(math.isfinite(value) for value in seen.values)


def _first(trial: Trial, start: int, end: int) -> Seen | None:
    """The first evaluation at or after `start` tokens, if it is before `end`."""
    found = trial.at(start)
    return found if found is not None and found.tokens < end else None


def _median(values: list[float]) -> float:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
