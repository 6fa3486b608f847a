"""Figures of the space that a sweep searched: parallel coordinates, loss against learning rate, importance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.plots import GRID, INK, QUIET
from orchestrator.sweeps.axes import FEW, SearchedAxis, searched_axes, text_of
from orchestrator.sweeps.figures import (
    BEST,
    COLOURS,
    FAILURE,
    MARKERS,
    PALE,
    Picture,
    canvas,
    clipped,
    dress,
    even_ticks,
    lacks_values,
    legend,
    log_axis,
    log_ticks,
    note,
    precisions_of,
    scale_of,
    seed_word,
    value_limits,
)
from orchestrator.sweeps.importance import importance
from orchestrator.sweeps.results import PointResult, SweepResults
from search_spaces.trial import PRECISION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ABSENT = -0.08
"""height at which a line passes an axis that does not exist for its trial"""
LR, BATCH = "optim.lr", "batch.sequences"


# ---- parallel coordinates ---------------------------------------------------------------------------------------


def draw_parallel(results: SweepResults) -> Figure | None:
    """One line a trial through its parameters to its objective."""
    axes = searched_axes(results) or searched_axes(results, fewest=1)
    if not axes:
        return None
    figure = canvas(max(9.0, 2.2 + 1.9 * (len(axes) + 1)), 5.6, "Parallel coordinates", results)
    panel = figure.subplots()
    scale = scale_of(results)
    limits = scale.get_clim()
    many = len(results.points) > 60
    for place, point in enumerate(reversed([*results.ranked, *results.unranked])):
        apart = 0.05 * (place / (len(results.points) - 1) - 0.5) if len(results.points) > 1 else 0.0
        heights = [_height(axis, point, apart) for axis in axes]
        colour, width, style = PALE, 0.8, "--"
        if point.mean is not None:
            heights.append((clipped(point.mean, limits) - limits[0]) / (limits[1] - limits[0]))
            done = point.state == "completed"
            colour, width, style = scale.to_rgba(point.mean), (1.3 if many else 2.0) if done else 0.7, "-"
        if point.failed:
            panel.plot(len(axes) - 1, heights[-1], marker="x", color=FAILURE, ms=6, zorder=4)
        if point is results.winner:
            panel.plot(range(len(heights)), heights, color=BEST, lw=6, alpha=0.35, zorder=3, solid_capstyle="round")
        panel.plot(
            range(len(heights)), heights, color=colour, lw=width, ls=style, marker="o", ms=width + 1, zorder=3,
            alpha=0.6 if many else 0.9, solid_capstyle="round",
        )  # fmt: skip
    _parallel_axes(panel, axes, results, limits)
    if any(point.mean is not None for point in results.points):
        figure.colorbar(scale, ax=panel, pad=0.02, aspect=35).set_label(results.objective.metric, color=INK)
    return figure


def _height(axis: SearchedAxis, point: PointResult, apart: float) -> float:
    """0 to 1 along an axis; ABSENT where the trial has none of it.

    Lines through one of few values lie `apart` from it, so that none hides another.
    """
    position = axis.position(point)
    if position is None:
        return ABSENT
    return axis.fraction(position) + (apart if len(axis.tried) <= FEW else 0.0)


def _parallel_axes(
    panel: Axes, axes: Sequence[SearchedAxis], results: SweepResults, limits: tuple[float, float]
) -> None:
    panel.set_xlim(-0.35, len(axes) + 0.3)
    lacking = any(axis.path not in point.params for axis in axes for point in results.points)
    panel.set_ylim(ABSENT - 0.04 if lacking else -0.05, 1.06)
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    names = [*(axis.path for axis in axes), results.objective.metric]
    panel.set_xticks(range(len(names)), names, color=INK, fontsize=10.5, parse_math=False)
    panel.tick_params(length=0)
    for place, axis in enumerate(axes):
        panel.plot([place, place], [0, 1], color=QUIET, lw=1.2, zorder=1)
        for position, label in axis.ticks() or _round_ticks(axis):
            _tick(panel, place, axis.fraction(position), label)
        if any(axis.path not in point.params for point in results.points):
            _tick(panel, place, ABSENT, "not there")
    panel.plot([len(axes), len(axes)], [0, 1], color=QUIET, lw=1.2, zorder=1)
    for value in even_ticks(*limits) if any(point.mean is not None for point in results.points) else ():
        _tick(panel, len(axes), (value - limits[0]) / (limits[1] - limits[0]), f"{value:.6g}")


def _round_ticks(axis: SearchedAxis) -> list[tuple[float, str]]:
    """Of an axis with many values."""
    low, high = axis.tried[0], axis.tried[-1]
    return [(value, text_of(value)) for value in (log_ticks if axis.log else even_ticks)(low, high)]


def _tick(panel: Axes, place: float, height: float, label: str) -> None:
    panel.plot([place - 0.02, place + 0.02], [height, height], color=QUIET, lw=1.2, zorder=1)
    panel.text(
        place - 0.04, height, label, ha="right", va="center", fontsize=9, color=INK, zorder=5, parse_math=False,
        bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.6},
    )  # fmt: skip


# ---- loss against learning rate ---------------------------------------------------------------------------------


def draw_learning_rate(results: SweepResults) -> Figure | None:
    """The objective against the learning rate, a line for each batch size, a panel for each precision."""
    points = [point for point in results.points if math.isfinite(_rate(point))]
    if not points or (len({_rate(point) for point in points}) < 2 and len(results.points) > 1):
        return None
    precisions = precisions_of(results)
    figure = canvas(min(15.0, 4.2 + 4.8 * len(precisions)), 5.4, "Objective against learning rate", results)
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    limits = value_limits(results)
    batches = sorted({point.config.get(BATCH, "") for point in points}, key=lambda text: (len(text), text))
    joined = {axis.path for axis in searched_axes(results)} <= {LR, BATCH, PRECISION}
    for panel, precision in zip(panels, precisions, strict=True):
        metric = f"{results.objective.metric}{seed_word(results)}" if panel is panels[0] else ""
        dress(panel, "learning rate", metric)
        for index, batch in enumerate(batches):
            here = [p for p in points if p.precision == precision and p.config.get(BATCH, "") == batch]
            here.sort(key=_rate)
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            _Line(here, batch, colour, marker, joined).draw(panel, limits, results)
        log_axis(panel.xaxis, [_rate(point) for point in points])
        panel.set_ylim(limits)
        lacks_values(panel, results)
        if len(precisions) > 1:
            panel.set_title(precision or "precision unknown", fontsize=11, color=INK, parse_math=False)
    legend(panels[-1], "sequences a batch" if len(batches) > 1 or batches != [""] else None)
    return figure


@dataclass(frozen=True)
class _Line:
    """The trials of one batch size: filled where completed, hollow where stopped, a cross where failed."""

    points: list[PointResult]
    """by learning rate"""
    batch: str
    colour: str
    marker: str
    joined: bool
    """nothing but learning rate, batch and precision was searched, so a line through the points has a meaning"""

    def draw(self, panel: Axes, limits: tuple[float, float], results: SweepResults) -> None:
        style = "-" if self.joined else "none"
        panel.plot([], [], color=self.colour, marker=self.marker, ls=style, label=self.batch or "all")
        completed = [point for point in self.points if point.state == "completed" and point.mean is not None]
        heights = [clipped(point.mean or 0.0, limits) for point in completed]
        panel.plot([_rate(point) for point in completed], heights, color=self.colour, ls=style, lw=1.6)
        edge = limits[1] if results.objective.sign > 0 else limits[0]
        for point in self.points:
            if point.mean is not None:
                self._mark(panel, point, clipped(point.mean, limits), point is results.winner)
            elif point.failed:
                panel.plot(_rate(point), edge, marker="x", color=FAILURE, ms=8, mew=2, clip_on=False, zorder=5)

    def _mark(self, panel: Axes, point: PointResult, height: float, winner: bool) -> None:
        filled = point.state == "completed"
        inside = height == point.mean
        panel.errorbar(
            _rate(point), height, yerr=point.spread if inside else None, color=self.colour, marker=self.marker,
            ms=7 if filled else 5.5, mfc=self.colour if filled else "white", elinewidth=1.3, capsize=3, zorder=4,
            alpha=1.0 if filled else 0.8, clip_on=inside,
        )  # fmt: skip
        if winner:
            panel.plot(_rate(point), height, marker="o", ms=15, mfc="none", mec=INK, mew=1.8, zorder=5)
        if filled and not inside and len(self.points) <= FEW:
            panel.annotate(
                f"{point.mean:.3g}", (_rate(point), height), (0, -12), textcoords="offset points", fontsize=8,
                ha="center", color=QUIET,
            )  # fmt: skip


def _rate(point: PointResult) -> float:
    """The learning rate that the trial really trained with; NaN where it is unknown."""
    try:
        rate = float(point.config.get(LR) or point.params.get(LR, math.nan))
    except (TypeError, ValueError):
        return math.nan
    return rate if 0 < rate < math.inf else math.nan


# ---- importance -------------------------------------------------------------------------------------------------


def draw_importance(results: SweepResults) -> Figure | None:
    """A bar for each parameter, with the method in words."""
    found = importance(results)
    figure = canvas(9.0, 2.0 + 0.42 * max(1, len(found.shares)), "Parameter importance", results)
    panel = figure.subplots()
    dress(panel, found.method if found.shares else "", "")
    if not found.shares:
        panel.set_axis_off()
        note(panel, found.method)
        return figure
    shares = found.shares[::-1]
    bars = panel.barh([path for path, _ in shares], [share for _, share in shares], color=COLOURS[0], height=0.62)
    panel.bar_label(bars, [f"{share:.2f}" for _, share in shares], padding=4, color=INK, fontsize=10)
    for label in panel.get_yticklabels():
        label.set_parse_math(False)
    panel.set_xlim(0, 1.08)
    panel.grid(False, axis="y")
    panel.grid(True, axis="x", color=GRID)
    return figure


LEARNING_RATE = Picture(
    "learning_rate",
    "Objective against learning rate",
    "One line for each batch size. Filled: trained to the end; hollow: stopped early, so at fewer tokens, and "
    "at the edge where beyond it; a cross: failed. Bars are the standard deviation over seeds. The ring is the winner.",
    draw_learning_rate,
)
PARALLEL = Picture(
    "parallel_coordinates",
    "Parallel coordinates",
    "Each line is a trial; dark is good. Thin lines were stopped early, dashed ones have no value (a cross: failed). "
    "The broad line is the winner.",
    draw_parallel,
)
IMPORTANCE = Picture(
    "importance",
    "Parameter importance",
    "How much of the differences between trials each parameter explains. It speaks of the values that were tried.",
    draw_importance,
)
