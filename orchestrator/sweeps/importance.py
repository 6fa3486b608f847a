"""How much of the differences between trials each searched parameter explains, with the method said beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from orchestrator.sweeps.axes import SearchedAxis, searched_axes
from orchestrator.sweeps.results import PointResult, SweepResults

FEWEST, ENOUGH = 8, 24
"""points with a value below which nothing is claimed, and from which on a forest of trees is fitted"""
SEED = 0


@dataclass(frozen=True)
class Importance:
    """A share for each searched path, or the reason why there is none."""

    shares: tuple[tuple[str, float], ...]
    """(path, 0 to 1), the largest first; of fANOVA they sum to 1, correlations do not"""
    method: str
    """how it was found, or why it was not, in a sentence"""


def importance(results: SweepResults) -> Importance:
    """fANOVA (Hutter et al. 2014, optuna's forest, seeded) on the told values, or rank correlation with few points.

    Failed points are left out: their penalty would drown the rest. An axis that some points lack is left out too.
    """
    points = results.ranked
    axes = [axis for axis in searched_axes(results) if all(axis.path in point.params for point in points)]
    axes = [axis for axis in axes if len({axis.position(point) for point in points}) > 1]
    told = [point.mean or 0.0 for point in points]
    if len(points) < FEWEST:
        return Importance((), f"Too few trials to say: {len(points)} with a value, at least {FEWEST} are needed.")
    if not axes:
        return Importance((), "Nothing to say: the trials with a value do not differ in any parameter.")
    if max(told) == min(told):
        return Importance((), "Nothing to say: every trial told the same value.")
    shares = _fanova(points, axes) if len(points) >= ENOUGH else None
    left_out = sum(point.failed for point in results.points)
    without = f", {left_out} failed left out" if left_out else ""
    if shares is not None:
        method = f"fANOVA: share of the variance of the told values ({len(points)} trials{without})."
    else:
        shares = [_correlation(points, axis) for axis in axes]
        method = f"Rank correlation with the told value, without interactions ({len(points)} trials{without})."
    named = zip((axis.path for axis in axes), shares, strict=True)
    return Importance(tuple(sorted(named, key=lambda share: (-share[1], share[0]))), method)


def _fanova(points: Sequence[PointResult], axes: Sequence[SearchedAxis]) -> list[float] | None:
    """Shares that sum to 1; None where the packages it needs are not installed."""
    try:
        import optuna
    except ModuleNotFoundError:
        return None
    if find_spec("sklearn") is None:  # optuna's fANOVA fits scikit-learn's forest
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    distributions = {axis.path: _distribution(points, axis) for axis in axes}
    for point in points:
        params = {axis.path: axis.position(point) for axis in axes}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=point.mean))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=SEED)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return [float(found[axis.path]) for axis in axes]


def _distribution(points: Sequence[PointResult], axis: SearchedAxis) -> object:
    import optuna

    if not axis.numeric:
        return optuna.distributions.CategoricalDistribution([float(n) for n in range(len(axis.categories))])
    positions = [axis.position(point) or 0.0 for point in points]
    return optuna.distributions.FloatDistribution(min(positions), max(positions), log=axis.log)


def _correlation(points: Sequence[PointResult], axis: SearchedAxis) -> float:
    """0 to 1: |Spearman| for numbers; for categories the correlation ratio of the ranks (Pearson 1905)."""
    told = _ranks([point.mean or 0.0 for point in points])
    positions = [axis.position(point) or 0.0 for point in points]
    if axis.numeric:
        return abs(_pearson(_ranks(positions), told))
    middle = math.fsum(told) / len(told)
    between = 0.0
    for category in set(positions):
        group = [rank for position, rank in zip(positions, told, strict=True) if position == category]
        between += len(group) * (math.fsum(group) / len(group) - middle) ** 2
    total = math.fsum((rank - middle) ** 2 for rank in told)
    return math.sqrt(between / total) if total else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the least; equals share the mean of their ranks."""
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered, 1)))}
    count = {value: ordered.count(value) for value in first}
    return [first[value] + (count[value] - 1) / 2 for value in values]


def _pearson(one: Sequence[float], other: Sequence[float]) -> float:
    n = len(one)
    a, b = math.fsum(one) / n, math.fsum(other) / n
    covariance = math.fsum((x - a) * (y - b) for x, y in zip(one, other, strict=True))
    scale = math.sqrt(math.fsum((x - a) ** 2 for x in one) * math.fsum((y - b) ** 2 for y in other))
    return covariance / scale if scale else 0.0
