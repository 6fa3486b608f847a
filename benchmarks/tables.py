"""README.md's tables, made from results/*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, Figure

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results: made by `python -m benchmarks report` -->", "<!-- end of results -->"


def write_readme() -> None:
    """Replace everything between the two marks of README.md."""
    head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    found = sorted(RESULTS.glob("*.json"))
    parts = [table(path.stem, result) for path in found if "figures" in (result := json.loads(path.read_text()))]
    body = "\n".join(parts) if parts else "Nothing has been measured yet.\n"
    README.write_text(f"{head}{BEGIN}\n\n{body}\n{END}{tail}", encoding="utf-8")


def table(name: str, result: dict[str, Any]) -> str:
    """One result as a Markdown table, under the machine it was measured on."""
    figures = [Figure(**figure) for figure in result["figures"]]
    rows = [f"| {figure.what} | {figure.shown} | {figure.wanted} | {figure.verdict} |" for figure in figures]
    head = ["| figure | measured (95% interval) | bar | |", "|---|--:|--:|---|"]
    return "\n".join([f"### {name}", "", described(result["machine"]), "", *head, *rows, ""])


def described(machine: dict[str, Any]) -> str:
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    return f"{machine['date']}, {where}, torch {machine['torch']}, steal {machine['steal']:.1%}."
