"""report: what a sweep found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.verbs import options

if TYPE_CHECKING:
    from orchestrator.sweeps.results import SweepResults


def report(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="Name of a sweep.", show_default=False)],
    runs_dir: options.RunsDir = options.DEFAULT_RUNS,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FILE", help="Where the HTML page goes.", show_default="RUNS/SWEEP/report.html"
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print one Markdown document.")] = False,
    json: options.Json = False,
) -> int:
    """Say what a sweep found: the ranking with its noise, what was stopped and why, the cost, the winning command.

    Reads MLflow alone, also while the sweep runs, and writes an HTML page with figures beside the sweep (under --json
    and --markdown only where --output says so).

    [bold]Examples[/bold]

      orchestrate report first-sweep
      orchestrate report first-sweep --output /tmp/first-sweep.html
      orchestrate report first-sweep --json | jq .best.params
      orchestrate report first-sweep --markdown > RESULTS.md
    """
    from orchestrator.sweeps.stored import read_sweep
    from trainers.errors import UserError

    if json and markdown:
        raise UserError("--json and --markdown both print the report: choose one of them.")
    if output is not None and os.path.isdir(output):
        raise UserError(f"--output {output} is a folder: name a file in it, such as {output / 'report.html'}.")
    if output is not None and os.path.exists(output) and not os.path.isfile(output):
        raise UserError(f"--output {output} is no regular file, and would be replaced by one: name another.")
    results = read_sweep(runs_dir.absolute(), sweep)
    page = output or (None if json or markdown else runs_dir.absolute() / results.name / "report.html")
    if page is not None:
        from orchestrator.sweeps.report_html import write_page

        write_page(results, page)
    return _print(results, page, json=json, markdown=markdown)


def _print(results: SweepResults, page: Path | None, *, json: bool, markdown: bool) -> int:
    import sys

    from orchestrator.console import out, print_json
    from orchestrator.sweeps import report

    if json:
        print_json(report.facts(results))
    elif markdown:
        sys.stdout.write(report.markdown(results))
    else:
        console = out()
        report.print_closing(results, console)
        console.print(f"\npage: {page}", soft_wrap=True, markup=False)
    return 0
