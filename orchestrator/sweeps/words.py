"""What a sweep found, in words: the ranking as a sheet of texts, and the sentences around it.

The terminal, Markdown and the HTML page say the same because they say this.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.console import count, duration, short
from orchestrator.sweeps.axes import is_number, short_path, text_of
from orchestrator.sweeps.comparison import Noise, Stopped, as_good, cost, noise, states, stopped, trade_off
from orchestrator.sweeps.results import FAILED, STOPPED, PointResult, SweepResults

REASONS = {
    "nonfinite": "ended because the loss was no finite number",
    "oom": "ran out of memory",
    "error": "failed",
    "budget": "wait for more budget: the same command with more goes on",
    "user": "were interrupted: the same command goes on",
}
REASONS_OF_ONE = {
    "budget": "waits for more budget: the same command with more goes on",
    "user": "was interrupted: the same command goes on",
}
NAMES = 8
"""names in a sentence before it says how many more there are"""


@dataclass(frozen=True)
class Row:
    """A point of the space as texts."""

    cells: tuple[str, ...]
    state: str
    winner: bool


@dataclass(frozen=True)
class Sheet:
    """The ranking: headers, whether a column is of numbers, and the rows, ranked ones first."""

    headers: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[Row, ...]


def sheet(results: SweepResults) -> Sheet:
    """Every point. The columns of the searched parameters come between the trial's name and what it reached."""
    paths = results.paths
    metrics = [objective.metric for objective in results.objectives]
    headers = ["rank", "trial", *(short_path(path, paths) for path in paths), *metrics]
    headers += ["tokens", "tokens/s", "peak GiB", "state"]
    numbers = [all(is_number(point.params.get(path, 0)) for point in results.points) for path in paths]
    numeric = [True, False, *numbers, *(True for _ in metrics), True, True, True, False]
    front = {point.number for point in trade_off(results)}
    ranks = {point.number: rank for rank, point in enumerate(results.ranked, 1)}
    rows = []
    for point in (*results.ranked, *results.unranked):
        cells = [str(ranks.get(point.number, "-")), point.name + (" *" if point.number in front else "")]
        cells += [text_of(point.params[path]) if path in point.params else "-" for path in paths]
        cells += [value_words(point.mean, point.spread), *further(point, len(metrics))]
        cells += [short(point.tokens) if point.tokens else "-"]
        cells += [short(rate) if (rate := point.tokens_per_s) is not None else "-"]
        cells += [f"{peak:.2f}" if (peak := point.peak_gib) is not None else "-", state_words(point)]
        rows.append(Row(tuple(cells), point.state, point is results.winner))
    return Sheet(tuple(headers), tuple(numeric), tuple(rows))


def further(point: PointResult, metrics: int) -> list[str]:
    """The objectives after the first."""
    return [value_words(point.told[index], None) if point.told else "-" for index in range(1, metrics)]


def state_words(point: PointResult) -> str:
    """`completed`, `asha`, `failed: oom`; with several seeds how many of them where they differ."""
    word = f"failed: {point.state}" if point.failed and point.state != "error" else point.state
    word = "failed" if point.state == "error" else word
    alike = sum(trial.state == point.state for trial in point.trials)
    return word if alike == len(point.trials) else f"{word} ({alike} of {len(point.trials)} seeds)"


def value_words(mean: float | None, spread: float | None) -> str:
    """1.8432, or 1.843 ± 0.012: as many digits as the spread allows."""
    if mean is None:
        return "-"
    digits = 4 if abs(mean) < 1000 else 1
    if spread:
        digits = min(8, max(0, 1 - math.floor(math.log10(spread))))
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


# ---- sentences --------------------------------------------------------------------------------------------------


def headline(results: SweepResults) -> str:
    """What was searched, and how far it is."""
    settings = results.settings
    seeds = settings.get("seeds", 1)
    planned = settings.get("trials")
    of = f" of {planned}" if isinstance(planned, int) and planned > len(results.points) else ""
    words = [f"{results.name}: {len(results.points)}{of} trials"]
    words += [f"of {results.preset}" if results.preset else ""]
    words += [f"over {settings['space_name']}" if "space_name" in settings else ""]
    how = " + ".join(str(settings[key]) for key in ("searcher", "scheduler") if settings.get(key) not in (None, "none"))
    words += [f"({how})" if how else "", f"with {seeds} seeds each" if seeds != 1 else ""]
    return " ".join(word for word in words if word) + f", {results.state}"


def still_going(results: SweepResults) -> str:
    """A sentence for a sweep that has not ended, else nothing."""
    if results.running:
        at = ", ".join(f"{number} {state}" for state, number in sorted(states(results).items()))
        return (
            f"This sweep has not ended: it is still running, or its driver was killed, and then the same command goes "
            f"on. What follows is how it stands now ({at})."
        )
    if results.state == "stopped":
        return "This sweep was stopped before its end; the same command goes on with it."
    return ""


def winner_words(results: SweepResults) -> str:
    """Which setting is best, or that none is."""
    winner = results.winner
    if winner is None:
        return "No trial has a value: there is no best setting."
    params = ", ".join(f"{path}={text_of(value)}" for path, value in winner.params.items())
    reached = f"{results.objective.metric} {value_words(winner.mean, winner.spread)}"
    so_far = " so far" if results.running else ""
    unfinished = "" if winner.state == "completed" else f" (not trained to the end: {winner.state})"
    return f"Best{so_far}: {winner.name} with {reached}{unfinished}" + (f" at {params}." if params else ".")


def noise_words(results: SweepResults) -> str:
    """How sure that is."""
    found = noise(results)
    if results.winner is None:
        return ""
    if found is None:
        return "No other trial was trained as long, so there is nothing to compare it with."
    behind = f"{found.second.name} follows {found.difference:.3g} behind"
    if found.difference < 0:
        behind = f"{found.second.name} told a value better by {-found.difference:.3g}"
    if found.noise is None:
        return f"{behind}. With one seed each nobody knows whether that is more than noise: --seeds 3 would tell."
    return f"{behind}, {_verdict(results, found)}"


def _verdict(results: SweepResults, found: Noise) -> str:
    measure = f"{found.noise:.3g} (two standard errors of the difference over seeds)"
    if not found.within:
        return f"more than the noise of {measure}."
    alike = names_of(as_good(results))
    return f"which lies within the noise of {measure}. As good as the best, as far as the seeds tell: {alike}."


def stopped_words(results: SweepResults) -> list[str]:
    """What did not complete and why, a sentence each."""
    return [_stopped_sentence(group) for group in stopped(results)]


def _stopped_sentence(group: Stopped) -> str:
    one = len(group.points) == 1
    many = "1 trial" if one else f"{len(group.points)} trials"
    if group.reason in STOPPED:
        return f"{group.reason} stopped {many} at {count(group.tokens)} tokens: {names_of(group.points)}."
    reasons = REASONS | REASONS_OF_ONE if one else REASONS
    return f"{many} {reasons.get(group.reason, f'ended ({group.reason})')}: {names_of(group.points)}."


def counts_words(results: SweepResults) -> str:
    """'12 completed, 5 asha, 1 failed: oom'."""
    found = Counter(f"failed: {p.state}" if p.state in FAILED else p.state for p in results.points)
    return ", ".join(f"{number} {state}" for state, number in found.most_common())


def cost_words(results: SweepResults) -> list[tuple[str, str]]:
    """(what, how much)."""
    spent = cost(results)
    slots = f"{spent.slots} slot{'s' if spent.slots != 1 else ''}"
    rows = [
        ("trials", counts_words(results) or "none"),
        ("tokens", count(spent.tokens)),
        ("training", f"{duration(spent.train_s)} inside train(), over all trials and seeds"),
        ("wall time", f"{duration(spent.wall_s)} on {slots}"),
    ]
    if spent.overhead is not None:
        rows.append(("overhead", f"{spent.overhead:.2f} x the ideal of {duration(spent.ideal_s)} (training / slots)"))
    return rows


def names_of(points: Sequence[PointResult]) -> str:
    """'t0001, t0002 and 3 more'."""
    names = [point.name for point in points]
    return ", ".join(names[:NAMES]) + (f" and {len(names) - NAMES} more" if len(names) > NAMES else "")


FOOTNOTE = "* on the Pareto front of {} among the trials that completed"


def footnote(results: SweepResults) -> str:
    """What the star says; nothing where there is none."""
    metrics = ", ".join(objective.metric for objective in results.objectives)
    return FOOTNOTE.format(f"{metrics}, throughput and memory") if trade_off(results) else ""
