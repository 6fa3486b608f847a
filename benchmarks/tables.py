"""The tables of README.md and of docs/, made from results/*.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, Figure

HERE = Path(__file__).parent
PAGES: dict[Path, tuple[str, ...] | None] = {
    HERE / "README.md": None,
    HERE.parent / "docs" / "memory.md": ("memory_prediction", "trade_offs"),
}
"""which results a page shows; None: all"""
BEGIN, END = "<!-- results: made by `python -m benchmarks report` -->", "<!-- end of results -->"


def write_tables() -> None:
    """Replace everything between the two marks of each page."""
    for page, names in PAGES.items():
        page.write_text(with_tables(page.read_text(encoding="utf-8"), names), encoding="utf-8")


def with_tables(text: str, names: Sequence[str] | None) -> str:
    """A page's text with the tables of the results that there are."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    found = [path for path in sorted(RESULTS.glob("*.json")) if names is None or path.stem in names]
    parts = [table(path.stem, result) for path in found if "figures" in (result := json.loads(path.read_text()))]
    body = "\n".join(parts) if parts else "Nothing has been measured yet.\n"
    return f"{head}{BEGIN}\n\n{body}\n{END}{tail}"


def table(name: str, result: dict[str, Any]) -> str:
    """One result as a Markdown table, under the machine it was measured on."""
    figures = [Figure(**figure) for figure in result["figures"]]
    rows = [f"| {figure.what} | {figure.shown} | {figure.wanted} | {figure.verdict} |" for figure in figures]
    head = ["| figure | measured (95% interval) | bar | |", "|---|--:|--:|---|"]
    parts = [f"### {name}", "", described(result["machine"]), "", *head, *rows, ""]
    return "\n".join([*parts, *cells(result.get("cells", ())), *checks(result.get("checks", ()))])


def cells(measured: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A bench table: a line for every way that a preset was run in; one that was not says why."""
    if not measured:
        return
    yield "| preset, bf16 | run as | rows of tokens | tokens/s | step | peak memory | predicted | of the product | |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|---|"
    for cell in measured:
        rows = f"{cell['rows']} x {cell['sequence_length']:,}" if cell["sequence_length"] else str(cell["rows"] or "")
        shown = [
            _said(cell["tokens_per_s"], "{:,.0f}"),
            _said(cell["step_ms"], "{:,.1f} ms"),
            _said(cell["peak_bytes"], "{:.2f} GiB", 2**-30),
            _said(cell["predicted_bytes"], "{:.2f} GiB", 2**-30),
            _said(cell["utilisation"], "{:.1%}"),
        ]
        remark = "" if cell["fate"] == "ok" else f"{cell['fate']}: {cell['reason']}"
        yield f"| {cell['preset']} | {cell['way']} | {rows} | {' | '.join(shown)} | {remark} |"
    yield ""


def checks(findings: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for every check: its claim, the verdict, and why it was skipped or failed."""
    if not findings:
        return
    yield from ("| check | | |", "|---|---|---|")
    for finding in findings:
        yield f"| {finding['claim']} (`{finding['name']}`) | {finding['verdict']} | {finding['reason']} |"
    yield ""


def _said(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else form.format(value * factor)


def described(machine: dict[str, Any]) -> str:
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    return f"{machine['date']}, {where}, torch {machine['torch']}, steal {machine['steal']:.1%}."
