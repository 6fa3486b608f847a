"""Curves of a run, drawn from its metrics.jsonl alone. The only file that imports matplotlib, inside functions.

Figures are objects of their own on the Agg canvas: no pyplot, so no global state, no window, any thread.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.curves import Curves, Series, read_curves, running_median, smoothed, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, GRID = "#1f2933", "#7b8794", "#e4e7eb"
TRAIN, VALIDATION, ACCENT, ALARM = "#2f6db5", "#d9622b", "#3d8b6e", "#c81e3a"
PHASE_SHADES = ("#ffffff", "#eef2f7")
DPI = 120
TEXT_POINTS, MONOSPACED = 10.5, "DejaVu Sans Mono"  # shipped with matplotlib


# ---- the picture ------------------------------------------------------------------------------------------------


def plot_curves(metrics_path: Path, target: Path, title: str) -> bool:
    """Draw loss, perplexity, bits per byte, learning rate, gradient norm and throughput into the PNG `target`.

    Phases are shaded and named, incidents marked. False, and no file, where the record has nothing to draw yet.
    """
    curves = read_curves(metrics_path)
    if not any(len(series.finite) for series in curves.series.values()):
        return False
    figure = new_figure(15, 8.4)
    axes = figure.subplots(2, 3, sharex=True)
    for index, (panel, draw) in enumerate(zip(axes.flat, PANELS, strict=True)):
        _dress(panel, curves)
        draw(panel, curves)
        if not panel.lines:
            panel.set_yticks([])
            panel.text(0.5, 0.5, "nothing logged yet", transform=panel.transAxes, ha="center", color=QUIET)
        _shade_phases(panel, curves)
        _mark_incidents(panel, curves)
        if index >= 3:
            panel.set_xlabel("step (optimizer updates)", color=INK)
    figure.text(0.012, 0.985, title, va="top", fontsize=15, fontweight="bold", color=INK, parse_math=False)
    figure.text(0.988, 0.985, _summary(curves), ha="right", va="top", fontsize=11, color=QUIET)
    if curves.incidents:
        figure.text(0.988, 0.957, _incident_words(curves), ha="right", va="top", fontsize=11, color=ALARM)
    save(figure, target)
    return True


def _summary(curves: Curves) -> str:
    words = [f"step {curves.last_step:,}"]
    tokens = curves.get("perf/tokens_per_s")
    validation = curves.get("val/loss")
    if len(validation):
        words.append(f"validation loss {validation.values[-1]:.4f} (best {validation.values.min():.4f})")
    if len(tokens):
        words.append(f"{np.median(tokens.values):,.0f} tokens/s")
    return "   ·   ".join(words)


def _incident_words(curves: Curves) -> str:
    kinds = [kind for _, kind in curves.incidents]
    return "▲ incidents: " + ", ".join(f"{kind} × {kinds.count(kind)}" for kind in dict.fromkeys(kinds))


def _draw_loss(panel: Axes, curves: Curves) -> None:
    _name(panel, curves, "Loss", "nats per token")
    train, validation = curves.get("train/loss"), curves.get("val/loss")
    _noisy(panel, train, curves, TRAIN, "training")
    _points(panel, validation, VALIDATION, "validation")
    low = min(series.values.min(initial=math.inf) for series in (train, validation))
    high = max(running_median(series).max(initial=-math.inf) for series in (train, validation))
    if train.values.max(initial=-math.inf) > high + 0.5 * (high - low):  # a lone spike would flatten all the rest
        panel.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    _legend(panel)


def _draw_perplexity(panel: Axes, curves: Curves) -> None:
    _name(panel, curves, "Perplexity", "exp(loss), log scale")
    train = smoothed(curves.get("train/loss"), curves)
    _line(panel, Series(train.steps, np.exp(np.minimum(train.values, 20))), TRAIN, "training, smoothed", width=1.4)
    _points(panel, curves.get("val/perplexity"), VALIDATION, "validation")
    _log_scale(panel)
    _legend(panel)


def _draw_bits(panel: Axes, curves: Curves) -> None:
    _name(panel, curves, "Bits per byte of the validation text", "bits per byte")
    bits = curves.get("val/bits_per_byte")
    _points(panel, bits, VALIDATION, "validation")
    if not len(bits):
        return
    best = int(bits.values.argmin())
    late = bits.steps[best] > 0.6 * curves.last_step
    panel.annotate(
        f"best {bits.values[best]:.3f}", (bits.steps[best], bits.values[best]), (0, -16), color=INK, fontsize=10,
        textcoords="offset points", ha="right" if late else "left",
    )  # fmt: skip
    panel.margins(y=0.18)


def _draw_lr(panel: Axes, curves: Curves) -> None:
    _name(panel, curves, "Learning rate", "learning rate")
    _line(panel, curves.get("train/lr"), ACCENT, "learning rate", width=1.8)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("e-0", "e-"))


def _draw_grad_norm(panel: Axes, curves: Curves) -> None:
    _name(panel, curves, "Gradient norm before clipping", "L2 norm, log scale")
    _noisy(panel, curves.get("train/grad_norm"), curves, TRAIN, "gradient norm")
    _log_scale(panel)


def _draw_throughput(panel: Axes, curves: Curves) -> None:
    _name(panel, curves, "Throughput", "tokens per second")
    series = curves.get("perf/tokens_per_s")
    _noisy(panel, series, curves, ACCENT, "tokens per second")
    if len(series):
        panel.set_ylim(0, 1.25 * float(np.quantile(series.values, 0.995)) or 1)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


PANELS: tuple[Callable[[Any, Curves], None], ...] = (
    _draw_loss, _draw_perplexity, _draw_bits, _draw_lr, _draw_grad_norm, _draw_throughput,
)  # fmt: skip


# ---- strokes ----------------------------------------------------------------------------------------------------


def _name(panel: Axes, curves: Curves, title: str, unit: str) -> None:
    room_for_phases = 18 if len(curves.phases) > 1 else 7
    panel.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=room_for_phases)
    panel.set_ylabel(unit, color=INK)


def _line(panel: Axes, series: Series, colour: str, label: str, width: float) -> None:
    if len(series):
        drawn = thinned(series)
        panel.plot(drawn.steps, drawn.values, color=colour, lw=width, marker=_lone(series), ms=5, label=label)


def _noisy(panel: Axes, series: Series, curves: Curves, colour: str, label: str) -> None:
    """The values, pale, and their moving mean over them."""
    if len(series) < 25:
        _line(panel, series, colour, label, width=1.8)
        return
    raw = thinned(series)
    panel.plot(raw.steps, raw.values, color=colour, lw=0.8, alpha=0.35)
    _line(panel, smoothed(series, curves), colour, label, width=1.8)


def _points(panel: Axes, series: Series, colour: str, label: str) -> None:
    if len(series):
        drawn = thinned(series)
        marker = "o" if len(series) <= 60 else None
        panel.plot(drawn.steps, drawn.values, color=colour, lw=1.8, marker=marker, ms=4.5, label=label, zorder=3)


def _lone(series: Series) -> str | None:
    return "o" if len(series) == 1 else None


def _log_scale(panel: Axes) -> None:
    """Logarithmic where the values differ enough to need it, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = [value for line in panel.lines for value in np.asarray(line.get_ydata()) if value > 0]
    if not values or max(values) < 1.5 * min(values):
        return
    panel.set_yscale("log")
    decades = math.log10(max(values) / min(values))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    if decades < 6:
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _legend(panel: Axes) -> None:
    if len([line for line in panel.lines if not str(line.get_label()).startswith("_")]) > 1:
        panel.legend(loc="upper right", frameon=True, framealpha=0.85, edgecolor="none", fontsize=10)


def _dress(panel: Axes, curves: Curves) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.grid(True, color=GRID, lw=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(QUIET)
    panel.tick_params(colors=INK, labelsize=10, labelbottom=True)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 2.5, 5, 10]))
    last = max(curves.last_step, 1)
    panel.set_xlim(-0.015 * last, 1.015 * last)


def _shade_phases(panel: Axes, curves: Curves) -> None:
    """The phases as bands with their names above them; one phase needs neither."""
    if len(curves.phases) < 2:
        return
    begin, last = 0, max(curves.last_step, 1)
    for index, (name, _, end) in enumerate(curves.phases):
        panel.axvspan(begin, end, color=PHASE_SHADES[index % 2], lw=0, zorder=-2)
        if index:
            panel.axvline(begin, color=QUIET, lw=0.9, ls=(0, (4, 3)), zorder=1)
        room = max(3, int(48 * (end - begin) / last))
        panel.text(
            (begin + end) / 2, 1.012, name if len(name) <= room else name[: room - 1] + "…", ha="center", va="bottom",
            fontsize=9.5, color=QUIET, transform=panel.get_xaxis_transform(), parse_math=False,
        )  # fmt: skip
        begin = end


def _mark_incidents(panel: Axes, curves: Curves) -> None:
    """A mark at the foot of the panel and a hairline for each incident."""
    steps = [step for step, _ in curves.incidents]
    if steps:
        panel.plot(
            steps, [0.0] * len(steps), ls="none", marker="^", ms=7, color=ALARM, clip_on=False, zorder=5,
            transform=panel.get_xaxis_transform(), label="_incidents",
        )  # fmt: skip
    for step in steps[:50]:
        panel.axvline(step, color=ALARM, lw=0.7, alpha=0.35, zorder=1)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches on the Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(rect=(0.005, 0.005, 0.985, 0.92), wspace=0.03, hspace=0.06)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, target: Path) -> None:
    """Write the PNG whole: a reader finds the old picture or the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    figure.savefig(temporary, format="png", dpi=DPI)
    os.replace(temporary, target)


# ---- text as a picture ------------------------------------------------------------------------------------------


def plot_text(blocks: Iterable[Sequence[tuple[str, str]]], target: Path, title: str, *, columns: int = 96) -> None:
    """Blocks of running text whose parts have colours, as a PNG. A block is a list of (text, colour).

    Text is wrapped at `columns` characters of a monospaced font; a line break is drawn as a return sign.
    """
    lines: list[list[tuple[str, str]]] = []
    for block in blocks:
        lines += [*wrapped(block, columns), []]
    margin, top, step = 0.25, 0.7, 0.225  # inches
    advance = _monospaced_advance()
    width, height = 2 * margin + columns * advance, top + step * len(lines)
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    figure.text(
        margin / width, 1 - 0.15 / height, title, va="top", fontsize=14, fontweight="bold", color=INK, parse_math=False
    )
    for number, line in enumerate(lines):
        column = 0
        for text, colour in line:
            figure.text(
                (margin + column * advance) / width, 1 - (top + step * number) / height, text, va="baseline",
                fontsize=TEXT_POINTS, family=MONOSPACED, color=colour, parse_math=False,
            )  # fmt: skip
            column += len(text)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # characters that the font lacks are drawn as boxes
        save(figure, target)


def _monospaced_advance() -> float:
    """Width of a character in inches as it is really drawn: hinting rounds it to whole pixels."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font = FontProperties(family=MONOSPACED, size=TEXT_POINTS)
    width, _, _ = RendererAgg(10, 10, DPI).get_text_width_height_descent("x" * 100, font, False)
    return float(width) / 100 / DPI


def wrapped(block: Sequence[tuple[str, str]], columns: int) -> list[list[tuple[str, str]]]:
    """Lines of at most `columns` characters, each a list of (text, colour); breaks at spaces where it can."""
    characters = [(character, colour) for text, colour in block for character in _visible(text)]
    lines: list[list[tuple[str, str]]] = []
    start = 0
    while start < len(characters):
        end = _line_end(characters, start, columns)
        line: list[tuple[str, str]] = []
        for character, colour in characters[start:end]:
            if line and line[-1][1] == colour:
                line[-1] = (line[-1][0] + character, colour)
            else:
                line.append((character, colour))
        lines.append(line)
        start = end
    return lines


def _line_end(characters: Sequence[tuple[str, str]], start: int, columns: int) -> int:
    limit = min(start + columns, len(characters))
    for index in range(start, limit):
        if characters[index][0] == "⏎":
            return index + 1
    if limit == len(characters):
        return limit
    spaces = [index for index in range(start + columns // 2, limit) if characters[index][0] == " "]
    return spaces[-1] + 1 if spaces else limit


def _visible(text: str) -> str:
    shown = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "    ")
    return "".join(character if character.isprintable() else "·" for character in shown)
