"""Curves of a run, drawn from its metrics.jsonl alone. The only file that imports matplotlib, inside functions.

Figures are objects of their own on the Agg canvas: no pyplot, so no global state, no window, any thread.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, GRID = "#1f2933", "#7b8794", "#e4e7eb"
TRAIN, VALIDATION, ACCENT, ALARM = "#2f6db5", "#d9622b", "#3d8b6e", "#c81e3a"
PHASE_SHADES = ("#ffffff", "#eef2f7")
DPI = 120
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
    """(step, kind) of each row with a non-zero incident"""

    def get(self, name: str) -> Series:
        return self.series.get(name, Series(np.empty(0, np.int64), np.empty(0))).finite

    @property
    def last_step(self) -> int:
        return self.phases[-1][2] if self.phases else 0


def read_curves(metrics_path: Path) -> Curves:
    """Parse the record; a torn line is passed over. An absent or empty record has no series."""
    points: dict[str, dict[int, float]] = {}
    spans: dict[str, list[int]] = {}
    incidents: list[tuple[int, str]] = []
    for row in _rows(metrics_path):
        step, phase = row["step"], str(row.get("phase", "main"))
        span = spans.setdefault(phase, [step, step])
        span[0], span[1] = min(span[0], step), max(span[1], step)
        for name, value in row.items():
            if "/" not in name or not isinstance(value, int | float):
                continue
            points.setdefault(name, {}).setdefault(step, float(value))  # first write wins
            if value and (name.startswith("incidents/") or name == "resume/diverged"):
                incidents.append((step, name.partition("/")[2].replace("nonfinite", "non-finite")))
    series = {}
    for name, by_step in points.items():
        steps = np.fromiter(by_step, np.int64, len(by_step))
        order = np.argsort(steps, kind="stable")
        series[name] = Series(steps[order], np.fromiter(by_step.values(), np.float64, len(by_step))[order])
    phases = sorted(((name, first, last) for name, (first, last) in spans.items()), key=lambda span: span[1])
    return Curves(series, tuple(phases), tuple(sorted(incidents)))


def _rows(metrics_path: Path) -> Iterator[dict[str, Any]]:
    if not metrics_path.exists():
        return
    with metrics_path.open(encoding="utf-8", errors="replace") as record:
        for line in record:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def thinned(series: Series, limit: int = MAX_POINTS) -> Series:
    """At most `limit` points that keep the lowest and the highest of every stretch, so no spike is lost."""
    if len(series) <= limit:
        return series
    edges = np.linspace(0, len(series), limit // 2 + 1).astype(int)
    kept: set[int] = {0, len(series) - 1}
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        part = series.values[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    index = np.array(sorted(kept))
    return Series(series.steps[index], series.values[index])


def smoothed(series: Series, window: int) -> Series:
    """The mean of the last `window` points (fewer at the beginning)."""
    if len(series) == 0:
        return series
    sums = np.concatenate([[0.0], np.cumsum(series.values)])
    ends = np.arange(1, len(series) + 1)
    starts = np.maximum(0, ends - window)
    return Series(series.steps, (sums[ends] - sums[starts]) / (ends - starts))


# ---- the picture ------------------------------------------------------------------------------------------------


def plot_curves(metrics_path: Path, target: Path, title: str) -> bool:
    """Draw loss, perplexity, bits per byte, learning rate, gradient norm and throughput into the PNG `target`.

    Phases are shaded and named, incidents marked. False, and no file, where the record has nothing to draw yet.
    """
    curves = read_curves(metrics_path)
    if not any(len(series.finite) for series in curves.series.values()):
        return False
    figure = _figure(15, 8.4)
    axes = figure.subplots(2, 3, sharex=True)
    for index, (panel, draw) in enumerate(zip(axes.flat, PANELS, strict=True)):
        _dress(panel, curves)
        draw(panel, curves)
        if not panel.lines:
            panel.set_yticks([])
            panel.text(0.5, 0.5, "nothing logged yet", transform=panel.transAxes, ha="center", color=QUIET)
        _mark_incidents(panel, curves, named=index == 0)
        if index >= 3:
            panel.set_xlabel("step (optimizer updates)")
    figure.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold", color=INK, parse_math=False)
    figure.text(0.988, 0.982, _summary(curves), ha="right", va="top", fontsize=10.5, color=QUIET)
    save(figure, target)
    return True


def _summary(curves: Curves) -> str:
    words = [f"step {curves.last_step:,}"]
    tokens = curves.get("perf/tokens_per_s")
    validation = curves.get("val/loss")
    if len(validation):
        words.append(f"validation loss {validation.values[-1]:.4g} (best {validation.values.min():.4g})")
    if len(tokens):
        words.append(f"{np.median(tokens.values):,.0f} tokens/s")
    return "   ·   ".join(words)


def _draw_loss(panel: Axes, curves: Curves) -> None:
    panel.set_title("Loss")
    panel.set_ylabel("nats per token")
    _noisy(panel, curves.get("train/loss"), TRAIN, "training")
    _points(panel, curves.get("val/loss"), VALIDATION, "validation")
    _frame_loss(panel, [curves.get("train/loss"), curves.get("val/loss")])
    _legend(panel)


def _frame_loss(panel: Axes, drawn: Sequence[Series]) -> None:
    """Leave the first spike out of the frame where it would flatten all the rest."""
    values = np.concatenate([series.values for series in drawn])
    if len(values) < 50:
        return
    low, high = values.min(), np.quantile(values, 0.998)
    if values.max() > high + 0.5 * (high - low):
        panel.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))


def _draw_perplexity(panel: Axes, curves: Curves) -> None:
    panel.set_title("Perplexity")
    panel.set_ylabel("exp(loss), log scale")
    train = smoothed(curves.get("train/loss"), _window(curves.get("train/loss")))
    _line(panel, Series(train.steps, np.exp(np.minimum(train.values, 20))), TRAIN, "training, smoothed", width=1.4)
    _points(panel, curves.get("val/perplexity"), VALIDATION, "validation")
    _log_scale(panel)
    _legend(panel)


def _draw_bits(panel: Axes, curves: Curves) -> None:
    panel.set_title("Bits per byte of validation text")
    panel.set_ylabel("bits per byte")
    bits = curves.get("val/bits_per_byte")
    _points(panel, bits, VALIDATION, "validation")
    if len(bits):
        best = int(bits.values.argmin())
        panel.annotate(
            f"best {bits.values[best]:.3f}", (bits.steps[best], bits.values[best]), (0, 14), color=INK,
            textcoords="offset points", ha="right" if best > len(bits) / 2 else "left", fontsize=10,
        )  # fmt: skip
        panel.margins(y=0.18)


def _draw_lr(panel: Axes, curves: Curves) -> None:
    panel.set_title("Learning rate")
    panel.set_ylabel("learning rate")
    _line(panel, curves.get("train/lr"), ACCENT, "learning rate", width=1.8)
    panel.set_ylim(bottom=0)
    panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=True)


def _draw_grad_norm(panel: Axes, curves: Curves) -> None:
    panel.set_title("Gradient norm before clipping")
    panel.set_ylabel("L2 norm, log scale")
    _noisy(panel, curves.get("train/grad_norm"), TRAIN, "gradient norm")
    _log_scale(panel)


def _draw_throughput(panel: Axes, curves: Curves) -> None:
    panel.set_title("Throughput")
    panel.set_ylabel("tokens per second")
    series = curves.get("perf/tokens_per_s")
    _noisy(panel, series, ACCENT, "tokens per second")
    if len(series):
        panel.set_ylim(0, 1.25 * float(np.quantile(series.values, 0.995)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


PANELS: tuple[Callable[[Any, Curves], None], ...] = (
    _draw_loss, _draw_perplexity, _draw_bits, _draw_lr, _draw_grad_norm, _draw_throughput,
)  # fmt: skip


# ---- strokes ----------------------------------------------------------------------------------------------------


def _window(series: Series) -> int:
    return max(5, len(series) // 40)


def _line(panel: Axes, series: Series, colour: str, label: str, width: float) -> None:
    if len(series):
        drawn = thinned(series)
        panel.plot(drawn.steps, drawn.values, color=colour, lw=width, marker=_lone(series), ms=5, label=label)


def _noisy(panel: Axes, series: Series, colour: str, label: str) -> None:
    """The values, pale, and their moving mean over them."""
    if len(series) < 25:
        return _line(panel, series, colour, label, width=1.8)
    raw = thinned(series)
    panel.plot(raw.steps, raw.values, color=colour, lw=0.8, alpha=0.35)
    _line(panel, smoothed(series, _window(series)), colour, label, width=1.8)


def _points(panel: Axes, series: Series, colour: str, label: str) -> None:
    if len(series):
        drawn = thinned(series)
        marker = "o" if len(series) <= 60 else None
        panel.plot(drawn.steps, drawn.values, color=colour, lw=1.8, marker=marker, ms=4.5, label=label, zorder=3)


def _lone(series: Series) -> str | None:
    return "o" if len(series) == 1 else None


def _log_scale(panel: Axes) -> None:
    """Logarithmic where there is anything positive, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    values = [value for line in panel.lines for value in np.asarray(line.get_ydata()) if value > 0]
    if not values:
        return
    panel.set_yscale("log")
    low, high = min(values), max(values)
    if high < 1.5 * low:
        panel.set_ylim(low / 1.5, high * 1.5)
    decades = math.log10(max(high / low, 1.5))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    if decades < 5:
        formatter = ScalarFormatter()
        formatter.set_scientific(False)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _legend(panel: Axes) -> None:
    if len([line for line in panel.lines if not line.get_label().startswith("_")]) > 1:
        panel.legend(loc="upper right", frameon=True, framealpha=0.85, edgecolor="none", fontsize=10)


def _dress(panel: Axes, curves: Curves) -> None:
    """Frame, grid, and the phases behind everything."""
    panel.grid(True, color=GRID, lw=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(QUIET)
    panel.tick_params(colors=INK, labelsize=10, labelbottom=True)
    panel.title.set(fontsize=12, fontweight="bold", color=INK)
    panel.title.set_ha("left")
    panel.title.set_position((0.0, 1.0))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.xaxis.get_major_locator().set_params(integer=True, nbins=7)
    last = max(curves.last_step, 1)
    panel.set_xlim(-0.015 * last, 1.015 * last)
    if len(curves.phases) < 2:
        return
    begin = 0
    for index, (name, _, end) in enumerate(curves.phases):
        panel.axvspan(begin, end, color=PHASE_SHADES[index % 2], lw=0, zorder=-2)
        if index:
            panel.axvline(begin, color=QUIET, lw=0.9, ls=(0, (4, 3)), zorder=1)
        panel.text(
            (begin + end) / 2, 0.985, textwrap.shorten(name, 24, placeholder="…"), ha="center", va="top", fontsize=9,
            color=QUIET, transform=panel.get_xaxis_transform(), parse_math=False,
        )  # fmt: skip
        begin = end


def _mark_incidents(panel: Axes, curves: Curves, *, named: bool) -> None:
    """A tick at the foot of the panel for each incident, their kinds and numbers on the first panel."""
    if not curves.incidents:
        return
    steps = [step for step, _ in curves.incidents]
    panel.plot(
        steps, [0.0] * len(steps), ls="none", marker="^", ms=7, color=ALARM, clip_on=False, zorder=5,
        transform=panel.get_xaxis_transform(), label="_incidents",
    )  # fmt: skip
    for step in steps[:50]:
        panel.axvline(step, color=ALARM, lw=0.7, alpha=0.35, zorder=1)
    if named:
        kinds = [kind for _, kind in curves.incidents]
        words = ", ".join(f"{kind} × {kinds.count(kind)}" for kind in dict.fromkeys(kinds))
        panel.text(
            0.02, 0.04, f"▲ incidents: {words}", transform=panel.transAxes, color=ALARM, fontsize=9.5, parse_math=False
        )


def _figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches on the Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0.005, 0.0, 0.99, 0.965), wspace=0.03, hspace=0.05)
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

    Text is wrapped at `columns` characters of a monospaced font; a line break is drawn as a pale return sign.
    """
    lines: list[list[tuple[str, str]]] = []
    for block in blocks:
        lines += [*wrapped(block, columns), []]
    figure = _figure(11.5, max(1.6, 0.55 + 0.235 * len(lines)))
    figure.set_layout_engine("none")
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.14 / height, title, va="top", fontsize=13, fontweight="bold", color=INK, parse_math=False)
    for number, line in enumerate(lines):
        column = 0
        for text, colour in line:
            figure.text(
                0.02 + column * 0.96 / columns, 1 - (0.62 + 0.235 * number) / height, text, va="center", fontsize=9.8,
                family="DejaVu Sans Mono", color=colour, parse_math=False,
            )  # fmt: skip
            column += len(text)
    save_quietly(figure, target)


def save_quietly(figure: Figure, target: Path) -> None:
    """`save` without a warning for each character that the font lacks: they are drawn as boxes."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        save(figure, target)


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
