"""The report of a sweep on the terminal, as JSON and as Markdown. `tune` closes with the same lines."""

from __future__ import annotations

import html
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.console import pairs
from orchestrator.display import plain
from orchestrator.sweeps import words
from orchestrator.sweeps.comparison import as_good, cost, noise, stopped, trade_off
from orchestrator.sweeps.importance import importance
from orchestrator.sweeps.results import FAILED, PointResult, SweepResults, TrialResult

ROWS = 20
"""of the ranking on the terminal"""


WIDTH = 140
"""columns of the table in a file or a pipe, where no line needs to be folded"""


# ---- the terminal -----------------------------------------------------------------------------------------------


def print_closing(results: SweepResults, console: Console) -> None:
    """Print `closing_lines`; sentences and the command are never folded by us, so that they can be copied."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for part in closing_lines(results):
        console.print(part, soft_wrap=isinstance(part, Text))


def closing_lines(results: SweepResults, rows: int = ROWS) -> list[RenderableType]:
    """What to print one after another: the ranking, the answer and how sure it is, what was stopped, the cost."""
    parts: list[RenderableType] = [Text(plain(words.headline(results)), style="bold")]
    parts += [Text(plain(line), style="yellow") for line in (words.still_going(results), *results.notes) if line]
    if results.points:
        parts += [Text(""), _table(results, rows)]
    hidden = len(results.points) - rows
    more = f"and {hidden} more (--json has all of them)" if hidden > 0 else ""
    parts += [Text(line, style="dim") for line in (more, words.footnote(results)) if line]
    parts += [Text("")]
    parts += [Text(plain(words.winner_words(results)), style="bold green" if results.winner else "bold red")]
    said = (results.lineage, words.noise_words(results), *words.stopped_words(results))
    parts += [Text(plain(line)) for line in said if line]
    parts += [Text(plain(f"Left out of the space: {cell} ({reason})")) for cell, reason in results.taken_out]
    parts += [Text(""), pairs([(name, Text(plain(value))) for name, value in words.cost_words(results)])]
    if results.command:
        parts += [Text(""), Text(plain(results.command), style="cyan")]
    return parts


def _table(results: SweepResults, limit: int) -> Table:
    sheet = words.sheet(results)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header, numeric in zip(sheet.headers, sheet.numeric, strict=True):
        table.add_column(Text(plain(header)), justify="right" if numeric else "left", overflow="fold")
    for row in sheet.rows[:limit]:
        table.add_row(*(Text(plain(cell)) for cell in row.cells), style=_style(row))
    return table


def _style(row: words.Row) -> str:
    if row.winner:
        return "bold green"
    if row.state in FAILED:
        return "red"
    return {"completed": "", "running": "cyan", "waiting": "cyan"}.get(row.state, "dim")


# ---- JSON -------------------------------------------------------------------------------------------------------


def facts(results: SweepResults) -> dict[str, Any]:
    """Everything the report says, as plain values for `print_json`; seconds, tokens, GiB."""
    winner, found, spent, weights = results.winner, noise(results), cost(results), importance(results)
    ranks = {point.number: rank for rank, point in enumerate(results.ranked, 1)}
    return {
        "sweep": results.name,
        "state": results.state,
        "stop_reason": results.stop_reason,
        "preset": results.preset,
        "objectives": [objective.model_dump() for objective in results.objectives],
        "settings": dict(results.settings),
        "best": None if winner is None else _point(winner, ranks.get(winner.number)),
        "command": results.command,
        "lineage": results.lineage,
        "noise": None
        if found is None
        else {
            "second": found.second.name,
            "difference": found.difference,
            "noise": found.noise,
            "within": found.within,
            "as_good": [point.name for point in as_good(results)],
        },
        "trials": [_point(point, ranks.get(point.number)) for point in (*results.ranked, *results.unranked)],
        "pareto_front": [point.name for point in trade_off(results)],
        "stopped": [
            {"reason": group.reason, "tokens": group.tokens, "trials": [point.name for point in group.points]}
            for group in stopped(results)
        ],
        "importance": {"method": weights.method, "shares": dict(weights.shares)},
        "cost": {
            "train_s": spent.train_s,
            "wall_s": spent.wall_s,
            "ideal_s": spent.ideal_s,
            "overhead": spent.overhead,
            "tokens": spent.tokens,
            "slots": spent.slots,
        },
        "taken_out": [{"cell": cell, "reason": reason} for cell, reason in results.taken_out],
        "notes": list(results.notes),
    }


def _point(point: PointResult, rank: int | None) -> dict[str, Any]:
    return {
        "rank": rank,
        "trial": point.name,
        "state": point.state,
        "params": dict(point.params),
        "objective": point.mean,
        "spread": point.spread,
        "objectives": list(point.told),
        "tokens": point.tokens,
        "tokens_per_s": point.tokens_per_s,
        "peak_gib": point.peak_gib,
        "precision": point.precision,
        "seeds": [_seed(trial) for trial in point.trials],
    }


def _seed(trial: TrialResult) -> dict[str, Any]:
    return {
        "trial": trial.name,
        "state": trial.state,
        "curve": [list(evaluation) for evaluation in trial.curve],
        "mlflow_run_id": trial.run_id,
        "run_path": trial.run_path,
    }


# ---- Markdown ---------------------------------------------------------------------------------------------------


def markdown(results: SweepResults) -> str:
    """The report as a document of its own."""
    sheet = words.sheet(results)
    blocks = [f"# {_md(words.headline(results))}"]
    blocks += [f"> {_md(line)}" for line in (words.still_going(results), *results.notes) if line]
    blocks += [f"**{_md(words.winner_words(results))}** {_md(words.noise_words(results))}".rstrip()]
    blocks += [_md(results.lineage)] if results.lineage else []
    if results.command:
        blocks += [_fenced(results.command)]
    if sheet.rows:
        bars = ["---:" if numeric else "---" for numeric in sheet.numeric]
        lines = [sheet.headers, bars, *(row.cells for row in sheet.rows)]
        blocks += ["## Ranking", "\n".join(_md_row(line) for line in lines), _md(words.footnote(results))]
    if stops := words.stopped_words(results):
        blocks += ["## Stopped", "\n".join(f"- {_md(line)}" for line in stops)]
    blocks += ["## Cost", "\n".join(f"- {_md(name)}: {_md(value)}" for name, value in words.cost_words(results))]
    if results.taken_out:
        left = [f"- {_md(cell)}: {_md(reason)}" for cell, reason in results.taken_out]
        blocks += ["## Left out of the space", "\n".join(left)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _md(text: str) -> str:
    """Text that Markdown takes as it is: no markup, no cell or line ends."""
    safe = html.escape(plain(text), quote=False)
    for letter in "\\`*_[]|":
        safe = safe.replace(letter, f"\\{letter}")
    return safe


def _md_row(cells: Any) -> str:
    return "| " + " | ".join(cell if set(cell) <= set("-:") else _md(cell) for cell in cells) + " |"


def _fenced(command: str) -> str:
    fence = "```"
    while fence in command:
        fence += "`"
    return f"{fence}sh\n{plain(command)}\n{fence}"
