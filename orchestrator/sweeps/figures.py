"""The figures of a sweep, drawn from its results alone: canvases, strokes, and the list of what is drawn.

Like `plots.py` an importer of matplotlib, inside functions, without pyplot. Colours differ in lightness too, and every
colour that carries a meaning has a marker or a style beside it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.plots import DPI, GRID, INK, QUIET, save
from orchestrator.sweeps.results import STOPPED, PointResult, SweepResults
from search_spaces.trial import PRECISION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too light for lines; https://jfly.uni-koeln.de/color/
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BEST, FAILURE, PALE = "#d55e00", "#8c1c13", "#9aa5b1"


@dataclass(frozen=True)
class Picture:
    """One figure: its file is NAME.png."""

    name: str
    title: str
    caption: str
    """how to read it, in a sentence or two"""
    draw: Callable[[SweepResults], Figure | None]
    """None where the sweep has nothing of the kind"""


def draw_search_figures(results: SweepResults, folder: Path) -> list[Path]:
    """Draw every figure that the sweep has something for into `folder`; the files, in the order they are best read."""
    return [path for _, path in drawn_pictures(results, folder)]


def drawn_pictures(results: SweepResults, folder: Path) -> list[tuple[Picture, Path]]:
    """The same with what each file shows."""
    from orchestrator.sweeps.figures_course import BEST_SO_FAR, RUNGS, TRADE_OFF
    from orchestrator.sweeps.figures_search import IMPORTANCE, LEARNING_RATE, PARALLEL

    drawn = []
    for picture in (LEARNING_RATE, PARALLEL, IMPORTANCE, RUNGS, TRADE_OFF, BEST_SO_FAR):
        figure = picture.draw(results) if results.points else None
        if figure is not None:
            path = folder / f"{picture.name}.png"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph")  # letters that the font lacks are drawn as boxes
                save(figure, path)
            drawn.append((picture, path))
    return drawn


# ---- canvases and strokes ---------------------------------------------------------------------------------------


def canvas(width: float, height: float, title: str, results: SweepResults) -> Figure:
    """An empty figure of so many inches on the Agg canvas, with its title and the sweep's name above."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(rect=(0.01, 0.012, 0.98, 1 - 0.55 / height), wspace=0.04)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    top = 1 - 0.14 / height
    name = results.name if len(results.name) <= 30 else results.name[:29] + "…"
    words = f"{title} · {name}"
    figure.text(0.014, top, words, va="top", fontsize=13.5, fontweight="bold", color=INK, parse_math=False)
    return figure


def dress(panel: Axes, x_label: str, y_label: str) -> None:
    panel.grid(True, color=GRID, lw=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(QUIET)
    panel.tick_params(colors=INK, labelsize=10)
    panel.set_xlabel(x_label, color=INK, parse_math=False)
    panel.set_ylabel(y_label, color=INK, parse_math=False)


def legend(panel: Axes, title: str | None = None) -> None:
    """To the right of the panels, where it hides nothing; none for a single entry without a title."""
    handles, labels = panel.get_legend_handles_labels()
    if len(labels) > 1 or (labels and title):
        box = panel.figure.legend(
            handles, labels, title=title, loc="outside right center", edgecolor="none", fontsize=9.5, title_fontsize=9.5
        )
        for text in box.get_texts():
            text.set_parse_math(False)


def note(panel: Axes, words: str) -> None:
    """Say something where there is nothing to draw."""
    panel.text(
        0.5, 0.5, words, transform=panel.transAxes, ha="center", va="center", color=QUIET, fontsize=11, wrap=True,
        parse_math=False,
    )  # fmt: skip


def lacks_values(panel: Axes, results: SweepResults) -> None:
    """Where no trial has a value, say so and take the meaningless numbers off the axis."""
    if not any(point.mean is not None for point in results.points):
        panel.tick_params(labelleft=False)
        note(panel, "no trial has a value")


def log_axis(axis: Any, values: Iterable[float]) -> None:
    """Logarithmic, with a little room on both sides."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    from orchestrator.sweeps.axes import text_of

    values = list(values)
    low, high = min(values), max(values)
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    margin = max(1.02, (high / low) ** 0.05)
    low, high = low / margin, high * margin
    axis.set_major_locator(FixedLocator(log_ticks(low, high) if len(set(values)) > 1 else values[:1]))
    axis.set_major_formatter(lambda value, _: text_of(float(value)))
    axis.set_minor_formatter(NullFormatter())
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(low, high)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high: the decades, with their halves or with 2 and 5 where few lie inside."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(1 + n / 10 for n in range(90))):
        ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside
    return [low, high] if high > low else [low]


def even_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about five."""
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(nbins=5).tick_values(low, high) if low <= tick <= high]


def counts_axis(axis: Any) -> None:
    """Whole numbers with k and M: tokens, trials."""
    from matplotlib.ticker import MaxNLocator

    from orchestrator.console import short

    axis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))
    axis.set_major_formatter(lambda value, _: short(value))


def robust_limits(values: Sequence[float], sign: float) -> tuple[float, float]:
    """Limits that show every value but lone bad ones: Tukey's fence, 3 interquartile ranges beyond the worse quartile.

    `sign` is 1 where less is better. What lies beyond is drawn at the edge.
    """
    costs = sign * np.asarray(values, dtype=float)
    quartile, upper = np.quantile(costs, (0.25, 0.75))
    fence = upper + 3 * (upper - quartile)
    worst = float(costs[costs <= fence].max()) if (costs <= fence).any() else float(costs.max())
    best = float(costs.min())
    room = 0.06 * (worst - best) or 0.02 * abs(worst) or 1.0
    low, high = sorted((sign * (best - room), sign * (worst + room)))
    return low, high


def value_limits(results: SweepResults) -> tuple[float, float]:
    """Limits for told values: those of the trials that completed, where there are some; (0, 1) for no value at all.

    Trials that were stopped early told worse values at fewer tokens, which would flatten all differences that count.
    """
    completed = [point.mean for point in results.ranked if point.state == "completed" and point.mean is not None]
    told = completed if len(completed) >= 3 else [point.mean for point in results.points if point.mean is not None]
    return robust_limits(told, results.objective.sign) if told else (0.0, 1.0)


def clipped(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def scale_of(results: SweepResults) -> Any:
    """A colour for each objective value (cividis, alike to every eye): dark is good, lone bad ones do not count."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    dark_first = np.linspace(0.0, 0.8, 256)  # without the lightest fifth, which is hard to see on white
    colours = colormaps["cividis"](dark_first if results.objective.sign > 0 else dark_first[::-1])
    return ScalarMappable(Normalize(*value_limits(results), clip=True), ListedColormap(colours))


def precisions_of(results: SweepResults) -> list[str]:
    """That occur, in the order of the space where it names them."""
    from orchestrator.sweeps.axes import searched_axes

    order = [category for axis in searched_axes(results) if axis.path == PRECISION for category in axis.categories]
    found = sorted({point.precision for point in results.points})
    return [one for one in order if one in found] + [one for one in found if one not in order]


def seed_word(results: SweepResults) -> str:
    """', mean over seeds' where there are several."""
    return ", mean over seeds" if any(len(point.trials) > 1 for point in results.points) else ""


def is_stopped(point: PointResult) -> bool:
    return point.state in STOPPED
