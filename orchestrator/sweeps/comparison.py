"""Which points of a sweep are better than which, and what of it is noise. Pure functions of the results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.sweeps.results import FAILED, STOPPED, PointResult, SweepResults

STANDARD_ERRORS = 2.0
"""a difference of two means smaller than so many of its standard errors is called noise"""


@dataclass(frozen=True)
class Noise:
    """How far the second lies behind the winner, and how far two means differ by chance."""

    second: PointResult
    difference: float
    """of the means, 0 or more where the second is worse"""
    noise: float | None
    """STANDARD_ERRORS times the standard error of the difference; None with fewer than two seeds of either"""

    @property
    def within(self) -> bool:
        """Whether the difference lies within the noise."""
        return self.noise is not None and self.difference <= self.noise


def noise(results: SweepResults) -> Noise | None:
    """The winner against the best other point that was trained as long; None where there is no such two."""
    winner = results.winner
    if winner is None:
        return None
    others = [point for point in results.ranked if point is not winner and point.state == winner.state]
    return _against(results, winner, others[0]) if others else None


def as_good(results: SweepResults) -> tuple[PointResult, ...]:
    """The points trained as long as the winner whose difference from it lies within the noise."""
    winner = results.winner
    if winner is None:
        return ()
    others = [point for point in results.ranked if point is not winner and point.state == winner.state]
    return tuple(point for point in others if _against(results, winner, point).within)


def _against(results: SweepResults, winner: PointResult, other: PointResult) -> Noise:
    assert winner.mean is not None and other.mean is not None
    difference = results.objective.sign * (other.mean - winner.mean)
    return Noise(other, difference, difference_noise(winner, other))


def difference_noise(one: PointResult, other: PointResult) -> float | None:
    """2 sqrt(s1^2/n1 + s2^2/n2): two standard errors of the difference of two means (Welch)."""
    if one.spread is None or other.spread is None:
        return None
    variances = [point.spread**2 / len(point.values) for point in (one, other) if point.spread is not None]
    return STANDARD_ERRORS * math.sqrt(sum(variances))


def pareto_front(costs: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the rows (less is better in each column) that no other row dominates; of equal rows all.

    A row dominates another that is nowhere below it and above it somewhere.
    """
    return [
        index
        for index, row in enumerate(costs)
        if not any(_dominates(other, row) for place, other in enumerate(costs) if place != index)
    ]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def trade_off(results: SweepResults) -> tuple[PointResult, ...]:
    """The points that completed and that no other beats in loss, throughput and memory at once.

    A measure that some of them lack decides nothing.
    """
    points = [point for point in results.ranked if point.state == "completed"]
    columns: list[list[float]] = [
        [sign * value for value in told] for sign, told in zip(_signs(results), _told(points), strict=False)
    ]
    rates = [-rate for point in points if (rate := point.tokens_per_s) is not None]
    peaks = [peak for point in points if (peak := point.peak_gib) is not None]
    columns += [column for column in (rates, peaks) if len(column) == len(points)]
    front = set(pareto_front(list(zip(*columns, strict=True)))) if points else set()
    return tuple(point for index, point in enumerate(points) if index in front)


def _signs(results: SweepResults) -> list[float]:
    return [objective.sign for objective in results.objectives]


def _told(points: Iterable[PointResult]) -> list[tuple[float, ...]]:
    """A column for each objective."""
    return list(zip(*(point.told for point in points), strict=False))


@dataclass(frozen=True)
class Stopped:
    """Points that ended before their budget, by reason and rung."""

    reason: str
    tokens: int
    """at which the scheduler stopped them; 0 for failures, which have no rung"""
    points: tuple[PointResult, ...]


def stopped(results: SweepResults) -> tuple[Stopped, ...]:
    """What did not complete: by reason, then by the tokens of the rung."""
    groups: dict[tuple[str, int], list[PointResult]] = {}
    for point in results.points:
        if point.ended and point.state != "completed":
            groups.setdefault((point.state, rung_of(point) if point.state in STOPPED else 0), []).append(point)
    order = (*STOPPED, *FAILED)
    rank = {reason: place for place, reason in enumerate(order)}
    found = [Stopped(reason, tokens, tuple(points)) for (reason, tokens), points in groups.items()]
    return tuple(sorted(found, key=lambda group: (rank.get(group.reason, len(order)), group.tokens)))


def rung_of(point: PointResult) -> int:
    """Tokens of the last evaluation of a point, which is where a scheduler decided on it."""
    return point.curve[-1][0] if point.curve else point.tokens


def states(results: SweepResults) -> Counter[str]:
    """How many points are in each state."""
    return Counter(point.state for point in results.points)


@dataclass(frozen=True)
class Cost:
    """What a sweep took; times in seconds."""

    train_s: float
    """inside train(), summed over all trainings"""
    wall_s: float
    tokens: int
    slots: int

    @property
    def ideal_s(self) -> float:
        """The wall time were every slot training all the time."""
        return self.train_s / self.slots

    @property
    def overhead(self) -> float | None:
        """Wall time over the ideal, 1 at best; None before anything trained, or where part of the wall time is unknown.

        A command that was killed could not note how long it took.
        """
        return self.wall_s / self.ideal_s if 0 < self.ideal_s <= self.wall_s else None


def cost(results: SweepResults) -> Cost:
    return Cost(results.train_s, results.wall_s, results.tokens, results.slots)
