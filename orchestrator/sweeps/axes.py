"""SearchedAxis: one searched path as the points of a sweep have it, ready to be drawn or weighed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.display import plain
from orchestrator.sweeps.results import PointResult, SweepResults
from search_spaces.space import Space
from trainers.errors import ConfigError

FEW = 8
"""values of an axis that are told apart one by one"""


@dataclass(frozen=True)
class SearchedAxis:
    """A path with the values that were tried."""

    path: str
    numeric: bool
    log: bool
    """numbers whose ratios count"""
    categories: tuple[str, ...]
    """of an axis that is not numeric, in the order of the space"""
    tried: tuple[float, ...]
    """the positions that occur, rising"""

    def position(self, point: PointResult) -> float | None:
        """The number, or the place among the categories; None where the axis does not exist for the point."""
        if self.path not in point.params:
            return None
        value = point.params[self.path]
        return float(value) if self.numeric else float(self.categories.index(text_of(value)))

    def fraction(self, position: float) -> float:
        """0 for the least position that occurs, 1 for the greatest; a half where there is only one."""
        low, high = self.tried[0], self.tried[-1]
        if low == high:
            return 0.5
        if self.log:
            return math.log(position / low) / math.log(high / low)
        return (position - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """(position, label) of each value, where there are few enough to tell them apart; else none."""
        if not self.numeric:
            return [(position, self.categories[int(position)]) for position in self.tried]
        return [(position, text_of(position)) for position in self.tried] if len(self.tried) <= FEW else []


def searched_axes(results: SweepResults, fewest: int = 2) -> tuple[SearchedAxis, ...]:
    """An axis for each path on which the points have at least `fewest` values, in the order of the space."""
    space = _space(results.settings.get("space"))
    axes = [_axis(results, path, space) for path in results.paths]
    return tuple(axis for axis in axes if len(axis.tried) >= fewest)


def _axis(results: SweepResults, path: str, space: Mapping[str, Any]) -> SearchedAxis:
    values = [point.params[path] for point in results.points if path in point.params]
    if all(is_number(value) for value in values):
        log = getattr(space.get(path), "log", None)
        log = _spans_octaves(values) if log is None else bool(log and min(values) > 0)
        return SearchedAxis(path, True, log, (), tuple(sorted({float(value) for value in values})))
    listed = [text_of(option) for option in getattr(space.get(path), "values", ())]
    tried = sorted({text_of(value) for value in values})
    order = [option for option in listed if option in tried] + [option for option in tried if option not in listed]
    return SearchedAxis(path, False, False, tuple(order), tuple(map(float, range(len(order)))))


def _spans_octaves(values: list[Any]) -> bool:
    """Whether the numbers of a choice are better drawn by their logarithm."""
    return min(values) > 0 and max(values) >= 4 * min(values)


def _space(data: Any) -> Mapping[str, Any]:
    """Path -> domain as the sweep's settings have it; empty where they cannot be read."""
    try:
        return Space.from_json(data["axes"] if isinstance(data, dict) and "axes" in data else data)
    except ConfigError:
        return {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0


def text_of(value: Any) -> str:
    """A searched value as a person reads it: numbers in four digits, the rest as JSON would have it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return plain(str(value))
    if isinstance(value, float):
        return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(text_of(item) for item in value) + "]"
    return str(value)


def short_path(path: str, paths: Iterable[str]) -> str:
    """The last word of a path, or the whole where two paths end in it."""
    word = path.rsplit(".", 1)[-1]
    return path if sum(other.rsplit(".", 1)[-1] == word for other in paths) > 1 else word
