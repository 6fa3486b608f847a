"""The report of a sweep as one HTML page: no script, nothing fetched, everything from the store escaped."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from orchestrator.display import plain
from orchestrator.sweeps import words
from orchestrator.sweeps.figures import Picture, drawn_pictures
from orchestrator.sweeps.importance import importance
from orchestrator.sweeps.results import FAILED, STOPPED, UNENDED, SweepResults
from trainers.errors import UserError

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --quiet: #616e7c; --line: #d9dee4; --card: #f5f7fa; --page: #fff;
  --good: #0b6e4f; --bad: #a61b1b; --going: #0b5c94; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --quiet: #9aa5b1; --line: #3e4c59; --card: #1f2933;
  --page: #141a21; --good: #5fd3a8; --bad: #ff9b9b; --going: #7cc4fa; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
.quiet, figcaption, .more { color: var(--quiet); }
.note { border-left: 4px solid #d9822b; padding: .4rem .9rem; background: var(--card); }
.answer { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.25rem;
  margin: 1.25rem 0; }
.answer p { margin: .3rem 0; overflow-wrap: anywhere; }
.answer .best { font-size: 1.15rem; font-weight: 600; color: var(--good); }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
  margin: .8rem 0 0; overflow-x: auto; font: .9rem/1.45 ui-monospace, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { border-bottom: 2px solid var(--line); white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:nth-child(2) { white-space: nowrap; }
tr.winner td { font-weight: 600; color: var(--good); background: var(--card); }
tr.failed td { color: var(--bad); }
tr.going td { color: var(--going); }
tr.stopped td { color: var(--quiet); }
figure { margin: 0 0 2rem; break-inside: avoid; }
figure img { width: 100%; max-width: 1000px; height: auto; display: block; background: #fff;
  border: 1px solid var(--line); border-radius: 10px; padding: .4rem; }
figcaption { font-size: .9rem; margin-top: .4rem; max-width: 62rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; } li { overflow-wrap: anywhere; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--quiet); }
@media print {
  :root { color-scheme: light; --ink: #000; --quiet: #444; --line: #bbb; --card: #fff; --page: #fff; --good: #000;
    --bad: #000; --going: #000; }
  body { padding: 0; max-width: none; font-size: 11px; }
  h2 { break-after: avoid; } tr { break-inside: avoid; } thead { display: table-header-group; }
  .wide { overflow: visible; } details { display: none; }
}
"""


def write_page(results: SweepResults, target: Path) -> None:
    """Draw the figures and write the page to `target`, whole: a reader finds the old one or the new one.

    Raises UserError where it cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="orchestrate-report-") as folder:
        figures = [(picture, path.read_bytes()) for picture, path in drawn_pictures(results, Path(folder))]
    text = page(results, figures)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"the page {target} cannot be written: {error.strerror}. Name another file with --output."
        ) from None


def page(results: SweepResults, figures: Sequence[tuple[Picture, bytes]]) -> str:
    """The whole document. `figures` are PNG files."""
    body = [
        f"<h1>{_text(results.name)}</h1>",
        f'<p class="quiet">{_text(words.headline(results).partition(": ")[2])}</p>',
        *(f'<p class="note">{_text(line)}</p>' for line in (words.still_going(results), *results.notes) if line),
        _answer(results),
        *_section("Ranking", _ranking(results)),
        *_section("Figures", "\n".join(_figure(results, picture, png) for picture, png in figures)),
        *_section("What was stopped, and why", _list(words.stopped_words(results))),
        *_section("Cost", _pairs(words.cost_words(results))),
        *_section("Left out of the space", _list(f"{cell}: {reason}" for cell, reason in results.taken_out)),
        *_section("Settings of the sweep", _pairs(_settings(results))),
        _runs(results),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(results.name)}: report of a sweep</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return escape(plain(text))


def _section(title: str, content: str) -> Iterable[str]:
    return (f"<h2>{_text(title)}</h2>", content) if content else ()


def _answer(results: SweepResults) -> str:
    said = "".join(f"<p>{_text(line)}</p>" for line in (results.lineage, words.noise_words(results)) if line)
    command = f"<pre>{_text(results.command)}</pre>" if results.command else ""
    return f'<div class="answer"><p class="best">{_text(words.winner_words(results))}</p>{said}{command}</div>'


def _ranking(results: SweepResults) -> str:
    sheet = words.sheet(results)
    if not sheet.rows:
        return ""
    kinds = [' class="n"' if numeric else "" for numeric in sheet.numeric]
    head = "".join(f"<th{kind}>{_text(header)}</th>" for header, kind in zip(sheet.headers, kinds, strict=True))
    rows = [
        f'<tr class="{_class(row)}">'
        + "".join(f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(row.cells, kinds, strict=True))
        + "</tr>"
        for row in sheet.rows
    ]
    foot = words.footnote(results)
    body = "\n".join(rows)
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    return table + (f'<p class="quiet">{_text(foot)}</p>' if foot else "")


def _class(row: words.Row) -> str:
    if row.winner:
        return "winner"
    for name, states in (("failed", FAILED), ("going", UNENDED), ("stopped", STOPPED)):
        if row.state in states:
            return name
    return "completed"


def _figure(results: SweepResults, picture: Picture, png: bytes) -> str:
    caption = f"{picture.caption} {importance(results).method}" if picture.name == "importance" else picture.caption
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{_text(picture.title)}">'
        f"<figcaption><b>{_text(picture.title)}.</b> {_text(caption)}</figcaption></figure>"
    )


def _settings(results: SweepResults) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in results.settings.items() if name != "space"]


def _runs(results: SweepResults) -> str:
    """Where each training lies: its MLflow run and its folder."""
    trials = [trial for point in results.points for trial in point.trials]
    rows = "\n".join(
        f"<tr><td>{_text(trial.name)}</td><td>{_text(trial.run_id)}</td><td>{_text(trial.run_path)}</td></tr>"
        for trial in trials
    )
    head = "<thead><tr><th>training</th><th>MLflow run</th><th>folder</th></tr></thead>"
    table = f'<div class="wide"><table>{head}\n<tbody>\n{rows}\n</tbody></table></div>'
    return f"<details><summary>Where each training lies</summary>{table}</details>" if trials else ""


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    inner = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in rows)
    return f"<dl>{inner}</dl>" if inner else ""


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""
