"""Figures of how a sweep went and what it offers: rungs, best so far, the trade between loss, speed and memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.plots import INK, QUIET
from orchestrator.sweeps.comparison import stopped, trade_off
from orchestrator.sweeps.figures import (
    BEST,
    COLOURS,
    FAILURE,
    MARKERS,
    PALE,
    Picture,
    canvas,
    clipped,
    counts_axis,
    dress,
    is_stopped,
    lacks_values,
    legend,
    log_axis,
    precisions_of,
    robust_limits,
    seed_word,
    value_limits,
)
from orchestrator.sweeps.results import PointResult, SweepResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MANY = 60
"""trials whose lines are drawn thinner"""
Measure = Callable[[PointResult], float]
"""of a completed point, NaN where it is unknown"""


# ---- rungs over time --------------------------------------------------------------------------------------------


def draw_rungs(results: SweepResults) -> Figure | None:
    """The value of each trial at its evaluations, by tokens; it ends where the trial was stopped."""
    points = [point for point in results.points if point.curve]
    if not points:
        return None
    figure = canvas(10.5, 5.6, "Every trial at its evaluations", results)
    panel = figure.subplots()
    dress(panel, "tokens", f"{results.objective.metric}{seed_word(results)}")
    limits = robust_limits([value for point in points for _, value in point.curve], results.objective.sign)
    for point in points:
        _course(panel, point, limits, results)
    _rungs(panel, results)
    panel.set_ylim(limits)
    panel.set_xlim(left=0)
    counts_axis(panel.xaxis)
    styles: dict[str, dict[str, Any]] = {
        "completed": {"color": COLOURS[0], "lw": 1.6},
        "stopped early": {"color": PALE, "lw": 1.0, "marker": "|", "ms": 9, "mew": 1.6},
        "failed": {"color": FAILURE, "lw": 1.0, "marker": "x", "ms": 7},
        "going on": {"color": COLOURS[2], "lw": 1.2, "ls": "--"},
    }
    for label, style in styles.items():
        if any(_kind(point) == label for point in points):
            panel.plot([], [], label=label, **style)
    legend(panel)
    return figure


def _kind(point: PointResult) -> str:
    if point.failed:
        return "failed"
    if not point.ended:
        return "going on"
    return "completed" if point.state == "completed" else "stopped early"


def _course(panel: Axes, point: PointResult, limits: tuple[float, float], results: SweepResults) -> None:
    tokens, values = zip(*((at, clipped(value, limits)) for at, value in point.curve), strict=True)
    kind = _kind(point)
    colour, width, order = {
        "completed": (COLOURS[0], 1.5, 3),
        "stopped early": (PALE, 0.9, 2),
        "failed": (FAILURE, 0.9, 2),
        "going on": (COLOURS[2], 1.2, 3),
    }[kind]
    if point is results.winner:
        colour, width, order = BEST, 2.8, 4
    elif len(results.points) > MANY:
        width /= 2
    lone = "o" if len(tokens) == 1 else None
    style = "--" if kind == "going on" else "-"
    panel.plot(tokens, values, color=colour, lw=width, ls=style, zorder=order, alpha=0.9, marker=lone, ms=4)
    if kind in ("stopped early", "failed"):
        marker = "|" if kind == "stopped early" else "x"
        panel.plot(tokens[-1], values[-1], marker=marker, ms=8, mew=1.6, color=colour, zorder=order)
    if point is results.winner:
        panel.annotate(
            f"{point.name} {values[-1]:.4g}", (tokens[-1], values[-1]), (-4, -13 if results.objective.sign > 0 else 9),
            textcoords="offset points", ha="right", fontsize=10, color=BEST, fontweight="bold", zorder=6,
        )  # fmt: skip


def _rungs(panel: Axes, results: SweepResults) -> None:
    """A line at each rung with how many were stopped there."""
    at: dict[int, int] = {}
    for group in stopped(results):
        if is_stopped(group.points[0]):
            at[group.tokens] = at.get(group.tokens, 0) + len(group.points)
    for tokens, count in sorted(at.items())[:12]:
        panel.axvline(tokens, color=QUIET, lw=0.9, ls=(0, (4, 3)), zorder=1)
        panel.text(
            tokens, 1.005, f"−{count}", transform=panel.get_xaxis_transform(), ha="center", va="bottom", fontsize=9,
            color=QUIET,
        )  # fmt: skip


# ---- best so far ------------------------------------------------------------------------------------------------


def draw_best_so_far(results: SweepResults) -> Figure | None:
    """What each ended trial told, in the order of ending, and the best up to it."""
    ended = sorted((p for p in results.points if p.end_s is not None), key=lambda p: (p.end_s or 0.0, p.number))
    if not ended:
        return None
    figure = canvas(10.5, 4.8, "Best so far", results)
    panel = figure.subplots()
    dress(panel, "ended trials", f"{results.objective.metric}{seed_word(results)}")
    limits = value_limits(results)
    edge = limits[1] if results.objective.sign > 0 else limits[0]
    for place, point in enumerate(ended, 1):
        if point.mean is None:
            panel.plot(place, edge, marker="x", ls="none", color=FAILURE, ms=7, mew=1.8, clip_on=False, zorder=4)
            continue
        filled = point.state == "completed"
        height = clipped(point.mean, limits)
        panel.errorbar(
            place, height, yerr=point.spread if height == point.mean else None, color=COLOURS[0], marker="o",
            ms=6 if filled else 4.5, mfc=COLOURS[0] if filled else "white", elinewidth=1, zorder=3, clip_on=False,
        )  # fmt: skip
    steps = best_so_far(ended, results.objective.sign)
    if steps:
        places, values = (list(column) for column in zip(*steps, strict=True))
        places, values = [*places, len(ended) + 0.5], [*values, values[-1]]
        panel.step(places, values, where="post", color=BEST, lw=2.2, zorder=4, label="best that completed")
    lacks_values(panel, results)
    styles: dict[str, dict[str, Any]] = {
        "completed": {"color": COLOURS[0], "marker": "o"},
        "stopped early": {"color": COLOURS[0], "marker": "o", "mfc": "white"},
        "failed": {"color": FAILURE, "marker": "x"},
    }
    for label, style in styles.items():
        if any(_kind(point) == label for point in ended):
            panel.plot([], [], ls="none", label=label, **style)
    panel.set_ylim(limits)
    panel.set_xlim(0.4, len(ended) + 0.6)
    counts_axis(panel.xaxis)
    legend(panel)
    return figure


def best_so_far(ended: Sequence[PointResult], sign: float) -> list[tuple[int, float]]:
    """(number of ended trials, best mean of those that completed), from the first such on."""
    best: float | None = None
    steps = []
    for place, point in enumerate(ended, 1):
        better = point.mean is not None and (best is None or sign * point.mean < sign * best)
        if better and point.state == "completed":
            best = point.mean
        if best is not None:
            steps.append((place, best))
    return steps


# ---- the trade --------------------------------------------------------------------------------------------------


def draw_trade_off(results: SweepResults) -> Figure | None:
    """The objective against throughput, memory and further objectives; a colour for each precision."""
    points = [point for point in results.ranked if point.state == "completed"]
    measures: list[tuple[str, Measure]] = [
        ("tokens per second", lambda point: _known(point.tokens_per_s)),
        ("peak memory in GiB", lambda point: _known(point.peak_gib)),
        *(
            (objective.metric, _further(index))
            for index, objective in enumerate(results.objectives)
            if index and objective.metric not in ("perf/tokens_per_s", "mem/peak_gib")
        ),
    ]
    shown = [(name, of) for name, of in measures if any(math.isfinite(of(point)) for point in points)]
    if not shown:
        return None
    figure = canvas(4.6 + 4.6 * len(shown), 5.2, "Objective against throughput and memory", results)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    limits = robust_limits([point.mean or 0.0 for point in points], results.objective.sign)
    front = trade_off(results)
    for panel, (name, of) in zip(panels, shown, strict=True):
        dress(panel, name, f"{results.objective.metric}{seed_word(results)}" if panel is panels[0] else "")
        _trade_panel(panel, [point for point in points if math.isfinite(of(point))], of, front, limits, results)
        panel.set_ylim(limits)
    if front:
        panels[-1].plot([], [], marker="o", ms=12, mfc="none", mec=INK, mew=1.4, ls="none", label="Pareto front")
    legend(panels[-1])
    return figure


def _further(index: int) -> Measure:
    """The objective of that index."""
    return lambda point: point.told[index] if len(point.told) > index else math.nan


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _trade_panel(
    panel: Axes,
    points: Sequence[PointResult],
    of: Measure,
    front: Sequence[PointResult],
    limits: tuple[float, float],
    results: SweepResults,
) -> None:
    values = [of(point) for point in points]
    for index, precision in enumerate(precisions_of(results)):
        here = [point for point in points if point.precision == precision]
        if not here:
            continue
        panel.plot(
            [of(point) for point in here], [clipped(point.mean or 0.0, limits) for point in here], ls="none", ms=7,
            color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)], label=precision or "trials",
        )  # fmt: skip
    for place, point in enumerate(sorted(front, key=lambda point: point.mean or 0.0)):
        at = (of(point), clipped(point.mean or 0.0, limits))
        panel.plot(*at, marker="o", ms=13, mfc="none", mec=INK, mew=1.4, zorder=4)
        if place < 8:
            panel.annotate(
                point.name, at, (9, -13 if place % 2 else 6), textcoords="offset points", fontsize=9, color=INK
            )
    if min(values) > 0 and max(values) > 8 * statistics.median(values):
        log_axis(panel.xaxis, values)
    else:
        panel.margins(x=0.12)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


RUNGS = Picture(
    "rungs",
    "Every trial at its evaluations",
    "Grey lines end where the scheduler stopped the trial; dashed verticals are its rungs with how many it stopped "
    "there. The bold line is the winner.",
    draw_rungs,
)
BEST_SO_FAR = Picture(
    "best_so_far",
    "Best so far",
    "Each mark is what an ended trial told, in the order in which they ended, at the edge where beyond it; crosses "
    "failed.",
    draw_best_so_far,
)
TRADE_OFF = Picture(
    "trade_off",
    "Objective against throughput and memory",
    "Trials that completed, by precision. Ringed ones form the Pareto front: no other is better in loss, throughput "
    "and memory at once.",
    draw_trade_off,
)
