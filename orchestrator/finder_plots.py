"""The pictures of find-lr and find-batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.batch_finder import BatchFindings
from orchestrator.bench import Bench
from orchestrator.plots import ACCENT, ALARM, GRID, INK, QUIET, TRAIN, VALIDATION, new_figure, save
from trainers.batch_probe import Probe
from trainers.lr_curve import LrCurve, LrSuggestion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIB = 2**30


def plot_lr_curve(curve: LrCurve, found: LrSuggestion | None, target: Path, title: str) -> None:
    """Loss over the learning rate, raw and smoothed, with the marks that the suggestion was read from, as a PNG."""
    figure = new_figure(11, 6.4)
    panel = figure.subplots()
    _dress(panel, "learning rate, log scale", "training loss, nats per token")
    panel.set_xscale("log")
    panel.plot(curve.lrs, curve.losses, color=TRAIN, lw=0.9, alpha=0.4, label="loss after an update at this rate")
    panel.plot(curve.lrs, curve.smoothed, color=TRAIN, lw=2.2, label=f"mean of {curve.window} around it")
    _show_what_falls(panel, curve)
    if found is not None:
        _mark_suggestion(panel, found)
    if curve.ended_at is not None:
        what = "diverged" if curve.ended == "diverged" else "not finite"
        panel.axvline(curve.ended_at, color=ALARM, lw=1.4, label=f"{what} at {curve.ended_at:.2g}")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none", fontsize=10)
    summary = f"suggested {found.suggested:.2g}" if found else "no suggestion"
    _headline(figure, title, f"{len(curve.losses)} steps   ·   {summary}")
    save(figure, target)


def _show_what_falls(panel: Axes, curve: LrCurve) -> None:
    """The axis ends a little above the loss before training: a diverging end would flatten all the rest."""
    if not curve.losses:
        panel.text(0.5, 0.5, "no finite loss", transform=panel.transAxes, ha="center", color=QUIET)
        return
    low, first = min(curve.losses), curve.first_loss
    room = max(first - low, 0.05 * abs(first), 1e-6)
    panel.set_ylim(low - 0.1 * room, min(max(curve.losses), first + 0.6 * room) + 0.1 * room)


def _mark_suggestion(panel: Axes, found: LrSuggestion) -> None:
    low, high = found.band
    panel.axvspan(low, high, color=ACCENT, alpha=0.12, lw=0, zorder=0, label=f"band {low:.2g} to {high:.2g}")
    marks = (
        ("steepest descent", found.steepest, ACCENT),
        ("minimum / 10", found.minimum_tenth, VALIDATION),
        ("minimum", found.minimum, QUIET),
    )
    for name, rate, colour in marks:
        chosen = ", suggested" if rate == found.suggested else ""
        style = "-" if chosen else (0, (4, 3))
        panel.axvline(rate, color=colour, lw=1.6, ls=style, label=f"{name} {rate:.2g}{chosen}")


def plot_batch(found: BatchFindings, target: Path, title: str) -> None:
    """Throughput and peak memory over the micro-batch, with the limit, as a PNG."""
    figure = new_figure(12, 5.6)
    speed, memory = figure.subplots(1, 2)
    for panel, unit in ((speed, "tokens per second of one worker"), (memory, "peak memory, GiB")):
        _dress(panel, "micro-batch (rows), log scale", unit)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _draw_speed(speed, found)
    _draw_memory(memory, found)
    best = f"largest {found.largest.micro}   ·   fastest {found.fastest.micro}   ·   use {found.recommended.micro}"
    _headline(figure, title, best)
    save(figure, target)


def plot_bench(bench: Bench, target: Path, title: str) -> None:
    """Throughput and peak memory over the batch, a line for each way to run, what ran out of memory crossed, as PNG."""
    figure = new_figure(12, 5.6)
    speed, memory = figure.subplots(1, 2)
    for panel, unit in ((speed, "tokens per second"), (memory, "peak memory, GiB")):
        _dress(panel, "batch (rows)", unit)
        panel.set_xticks(sorted({cell.rows for cell in bench.cells}))
    colours = dict(zip(bench.ways, (TRAIN, VALIDATION, ACCENT, INK, QUIET, ALARM) * len(bench.ways), strict=False))
    for way, colour in colours.items():
        ran = [cell for cell in bench.cells if cell.way == way and cell.probe.fate == "ok"]
        points = np.array([(c.rows, c.probe.tokens_per_s or 0.0, (c.measured_bytes or 0) / GIB) for c in ran])
        if len(points):
            speed.plot(points[:, 0], points[:, 1], color=colour, lw=1.8, marker="o", ms=5, label=way)
            memory.plot(points[:, 0], points[:, 2], color=colour, lw=1.8, marker="o", ms=5, label=way)
        lost = [cell.rows for cell in bench.cells if cell.way == way and cell.probe.fate != "ok"]
        memory.plot(lost, [bench.limit_bytes / GIB] * len(lost), color=colour, ls="none", marker="x", ms=8)
    memory.axhline(bench.limit_bytes / GIB, color=ALARM, lw=1.2, ls=(0, (4, 3)), label="limit")
    for panel in (speed, memory):
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
        panel.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", fontsize=10)
    _headline(figure, title, f"{len(bench.cells)} cells   ·   {bench.device}")
    save(figure, target)


def _draw_speed(panel: Axes, found: BatchFindings) -> None:
    points = [(probe.micro, probe.tokens_per_s) for probe in found.probes if probe.tokens_per_s is not None]
    panel.plot(*np.array(points).T, color=TRAIN, lw=1.8, marker="o", ms=5)
    for name, probe, colour, offset in _named(found):
        at = (probe.micro, probe.tokens_per_s or 0.0)
        panel.plot(*at, ls="none", marker="o", ms=11, mfc="none", mec=colour, mew=2)
        panel.annotate(name, at, (0, offset), textcoords="offset points", ha="center", color=colour, fontsize=11)
    panel.set_ylim(0, 1.18 * max(rate for _, rate in points))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _named(found: BatchFindings) -> list[tuple[str, Probe, str, int]]:
    """What to point at in the throughput: name, probe, colour, and how far above it the name stands, in points."""
    if found.fastest.micro == found.recommended.micro:
        return [("fastest, use this", found.fastest, ACCENT, 12)]
    return [("fastest", found.fastest, ACCENT, 12), ("use this", found.recommended, VALIDATION, -20)]


def _draw_memory(panel: Axes, found: BatchFindings) -> None:
    for fits, colour, label in ((True, TRAIN, "fits"), (False, ALARM, "does not fit")):
        own = [p for p in found.probes if p.fits is fits and p.peak_bytes is not None]
        measured = [p for p in own if p.fate == "ok"]
        foreseen = [p for p in own if p.fate != "ok"]
        line = "-" if fits else "none"
        if measured:
            panel.plot(*_peaks(measured), color=colour, lw=1.8, ls=line, marker="o", ms=5, label=label)
        if foreseen:
            panel.plot(*_peaks(foreseen), color=colour, ls="none", marker="x", ms=7, label=f"{label}, foreseen")
    highest = max((p.peak_bytes or 0) for p in found.probes) / GIB
    limit = found.limit_bytes / GIB
    if limit > 3 * highest:  # far away: say so instead of squeezing what was measured
        panel.set_ylim(0, 1.35 * highest)
        panel.text(0.98, 0.97, f"the limit is {limit:.1f} GiB", transform=panel.transAxes, ha="right", va="top",
                   color=ALARM, fontsize=10)  # fmt: skip
    else:
        panel.axhline(limit, color=ALARM, lw=1.2, ls=(0, (4, 3)), label=f"limit {limit:.2f} GiB")
        panel.set_ylim(0, 1.15 * max(highest, limit))
    panel.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none", fontsize=10)


def _peaks(probes: list[Probe]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([p.micro for p in probes]), np.array([p.peak_bytes for p in probes]) / GIB


def _dress(panel: Axes, x: str, y: str) -> None:
    panel.grid(True, color=GRID, lw=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(QUIET)
    panel.tick_params(colors=INK, labelsize=10)
    panel.set_xlabel(x, color=INK)
    panel.set_ylabel(y, color=INK)


def _headline(figure: Figure, title: str, summary: str) -> None:
    figure.text(0.012, 0.985, title, va="top", fontsize=15, fontweight="bold", color=INK, parse_math=False)
    figure.text(0.988, 0.985, summary, ha="right", va="top", fontsize=11, color=QUIET, parse_math=False)
