"""Searchers: which point of the space is tried next.

`ask` is a function of the settings, the space and the history, and of nothing else: a searcher may remember what it
has read of a history, to be quick, but one made anew asks the same, bit for bit. So a killed sweep goes on from its
journal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from random import Random
from typing import Protocol

from orchestrator.sweeps.draws import generator
from orchestrator.sweeps.history import FAILED, PENALTY, Ending, Event, History, Params
from orchestrator.sweeps.settings import Objective, SweepSettings
from search_spaces.space import Choice, Float, Int, Space

MOST_CELLS = 100_000
REDRAWS = 100
"""draws that may meet points asked for before, until the points left are listed instead"""


class Searcher(Protocol):
    def ask(self, history: History) -> Params | None:
        """The point of the next trial, path -> value; None where nothing is left to ask for."""


def build_searcher(settings: SweepSettings, space: Space) -> Searcher:
    """The searcher of a sweep. Loads Optuna where the settings name it."""
    if settings.searcher == "grid":
        return GridSearcher(space, settings.grid_points, settings.trials)
    if settings.searcher == "random":
        return RandomSearcher(space, settings.seed)
    from orchestrator.sweeps.tpe import TPESearcher

    return TPESearcher(space, settings.objectives, settings.seed, settings.trials)


def grid_cells(space: Space, points_per_axis: int) -> int:
    """How many cells the grid has, counted up to what no sweep trains: MOST_CELLS + 1 stands for that and all above."""
    return max(1, sum(1 for _ in islice(space.grid(points_per_axis), MOST_CELLS + 1)))


def trials_to_train(settings: SweepSettings, space: Space) -> int:
    """How many of the sweep's trials find a point: none is trained twice."""
    if settings.searcher == "grid":
        return min(settings.trials, grid_cells(space, settings.grid_points))
    if _never_ends(space):
        return settings.trials
    return sum(1 for _ in islice(_points(space), settings.trials))


def trials_and_points(settings: SweepSettings, space: Space) -> str | None:
    """A sentence for a person where a grid is larger than the sweep, whose trials then lie in a corner of it; or where
    there are fewer points than trials."""
    trained = trials_to_train(settings, space)
    if trained < settings.trials:
        points = "grid has {:,} cells" if settings.searcher == "grid" else "space has {:,} points"
        return f"the {points.format(trained)}: of --trials {settings.trials}, no more are trained"
    if settings.searcher != "grid" or (cells := grid_cells(space, settings.grid_points)) == trained:
        return None
    whole = cells <= MOST_CELLS
    there = f"{cells:,} cells" if whole else f"more than {MOST_CELLS:,} cells"
    all_of_them = f"say --trials {cells} for the whole grid, or" if whole else "say"
    return (
        f"the grid has {there}, and --trials {settings.trials} takes the first {settings.trials} in order, "
        f"{list(space)[-1]} fastest: {all_of_them} --searcher random for an even choice"
    )


class GridSearcher:
    """The cells of the grid in order, the first `limit` of them."""

    def __init__(self, space: Space, points_per_axis: int, limit: int):
        self._cells = tuple(islice(space.grid(points_per_axis), limit))

    def ask(self, history: History) -> Params | None:
        number = len(history.trials)
        return dict(self._cells[number]) if number < len(self._cells) else None


class RandomSearcher:
    """A draw for each trial, of its own seed: in a space of finitely many points no point twice.

    Nothing is left when every point has been asked for: training is deterministic, so a point says nothing new.
    """

    def __init__(self, space: Space, seed: int):
        self._space = space
        self._seed = seed
        self._asked = Asked()

    def ask(self, history: History) -> Params | None:
        self._asked.read(history)
        return unasked(self._space, self._asked, generator("random", self._seed, len(history.trials)))


# ---- what was asked for before --------------------------------------------------------------------------


@dataclass
class Reader:
    """What a history holds beyond what was read of it before; all of it where it is another history."""

    _history: History | None = None
    _read: int = 0

    def is_new(self, history: History) -> bool:
        return history is not self._history

    def read(self, history: History) -> Sequence[Event]:
        if self.is_new(history):
            self._history, self._read = history, 0
        events = history.events[self._read :]
        self._read = len(history.events)
        return events


@dataclass
class Asked:
    """The points that a history has asked for."""

    _reader: Reader = field(default_factory=Reader)
    _points: set[str] = field(default_factory=set)

    def read(self, history: History) -> None:
        if self._reader.is_new(history):
            self._points.clear()
        for event in self._reader.read(history):
            if event.kind == "asked":
                self._points.add(_text(history.trials[event.trial].params))

    def __contains__(self, params: Params) -> bool:
        return _text(params) in self._points


def unasked(space: Space, asked: Asked, rng: Random) -> Params | None:
    """A random point that was not asked for before; None where none is left.

    A space with a continuous axis never runs out: should all draws meet known points (of a branch without such an
    axis), the last of them comes again.
    """
    draws = (space.sample(rng) for _ in range(REDRAWS))
    found, last = first_unasked(draws, asked)
    if found is not None or _never_ends(space):
        return found if found is not None else last
    left = [point for point in _points(space) if point not in asked]
    return rng.choice(left) if left else None


def first_unasked(draws: Iterable[Params], asked: Asked) -> tuple[Params | None, Params | None]:
    """The first draw that was not asked for before, or None; and the last draw taken."""
    point = None
    for point in draws:
        if point not in asked:
            return point, point
    return None, point


def _never_ends(space: Space) -> bool:
    """Whether it has a continuous axis."""
    return any(isinstance(domain, Float) for domain in space.values())


def _points(space: Space) -> Iterator[Params]:
    """Every point of a space without continuous axes."""
    axes = (
        replace(axis, domain=Choice(tuple(range(axis.domain.low, axis.domain.high + 1, axis.domain.step))))
        if isinstance(axis.domain, Int)
        else axis
        for axis in space.axes
    )
    return Space(tuple(axes)).grid(1)


def _text(params: Params) -> str:
    return json.dumps(params, sort_keys=True)


# ---- what a searcher is told ----------------------------------------------------------------------------


def told(objectives: Sequence[Objective], ending: Ending) -> tuple[float, ...]:
    """The objectives of an ended trial, finite always: the penalty, in the worse direction, where there is none.

    Nothing lies beyond the penalty, so no trial ranks behind a failed one.
    """
    failed = ending.reason in FAILED
    values = ending.values if len(ending.values) == len(objectives) else (math.nan,) * len(objectives)
    return tuple(
        min(max(value, -PENALTY), PENALTY) if math.isfinite(value) and not failed else objective.sign * PENALTY
        for value, objective in zip(values, objectives, strict=True)
    )
