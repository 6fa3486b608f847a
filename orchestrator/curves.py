"""The curves of a run as numbers: metrics.jsonl by metric, with its phases and incidents, thinned and smoothed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainers.record import read_rows

MAX_POINTS = 2000  # more than the pixels of a panel; each kept bucket keeps its extremes


@dataclass(frozen=True)
class Series:
    """One metric over the run."""

    steps: np.ndarray
    """int64 (n,), rising"""
    values: np.ndarray
    """float64 (n,), NaN where the run logged NaN"""

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> Series:
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])


@dataclass(frozen=True)
class Curves:
    """What metrics.jsonl says, by metric."""

    series: dict[str, Series]
    phases: tuple[tuple[str, int, int], ...]
    """(name, first step, last step) in the order they ran"""
    incidents: tuple[tuple[int, str], ...]
    """(step, kind), in the order of steps"""

    def get(self, name: str) -> Series:
        return self.series.get(name, Series(np.empty(0, np.int64), np.empty(0))).finite

    @property
    def last_step(self) -> int:
        return self.phases[-1][2] if self.phases else 0


def read_curves(metrics_path: Path) -> Curves:
    """Parse the record; an absent or empty one has no series."""
    points: dict[str, dict[int, float]] = {}
    spans: dict[str, list[int]] = {}
    for row, _ in read_rows(metrics_path):
        step = row["step"]
        span = spans.setdefault(str(row.get("phase", "main")), [step, step])
        span[0], span[1] = min(span[0], step), max(span[1], step)
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float):
                points.setdefault(name, {}).setdefault(step, float(value))  # first write wins
    series = {name: _series(by_step) for name, by_step in points.items()}
    phases = sorted(((name, first, last) for name, (first, last) in spans.items()), key=lambda span: span[1])
    return Curves(series, tuple(phases), tuple(_incidents(series)))


def _series(by_step: Mapping[int, float]) -> Series:
    steps = np.fromiter(by_step, np.int64, len(by_step))
    order = np.argsort(steps, kind="stable")
    return Series(steps[order], np.fromiter(by_step.values(), np.float64, len(by_step))[order])


def _incidents(series: Mapping[str, Series]) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for name, counts in series.items():
        kind = name.partition("/")[2].replace("nonfinite", "non-finite")
        if name == "resume/diverged":
            found += [(int(step), kind) for step, count in zip(counts.steps, counts.values, strict=True) if count]
        elif name.startswith("incidents/"):  # a total over the run: an incident is where it rises
            rises = np.flatnonzero(np.diff(counts.values, prepend=0.0) > 0)
            found += [(int(counts.steps[index]), kind) for index in rises]
    return sorted(found)


def thinned(series: Series, limit: int = MAX_POINTS) -> Series:
    """At most `limit` points that keep the lowest and the highest of every stretch, so no spike is lost."""
    if len(series) <= limit:
        return series
    edges = np.linspace(0, len(series), limit // 2 + 1).astype(int)
    kept: set[int] = {0, len(series) - 1}
    for start, end in itertools.pairwise(edges):
        part = series.values[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    index = np.array(sorted(kept))
    return Series(series.steps[index], series.values[index])


def smoothed(series: Series, curves: Curves) -> Series:
    """The mean around each point over a fortieth of its phase, narrower where the phase begins and ends.

    A lone spike above everything that lasted counts as the median of its neighbours.
    """
    half_window = max(2, len(series) // 80)
    medians = running_median(series)
    values = np.where(series.values > medians.max(initial=-math.inf), medians, series.values)
    means = [np.empty(0)]
    for part in np.split(values, _phase_starts(series, curves)):
        at = np.arange(len(part))
        left = np.minimum(half_window, at)
        right = np.minimum(left, len(part) - 1 - at)
        sums = np.concatenate([[0.0], np.cumsum(part)])
        means.append((sums[at + right + 1] - sums[at - left]) / (left + right + 1))
    return Series(series.steps, np.concatenate(means))


def _phase_starts(series: Series, curves: Curves) -> np.ndarray:
    """Indices of the first point of each phase but the first."""
    return np.searchsorted(series.steps, [last for _, _, last in curves.phases[:-1]], side="right")


def running_median(series: Series) -> np.ndarray:
    """Of five neighbours, float64 (n,); the values themselves where there are too few to tell a spike from a curve."""
    if len(series) < 25:
        return series.values
    padded = np.concatenate([series.values[:2], series.values, series.values[-2:]])
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)
