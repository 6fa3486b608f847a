"""runs, status: what there is and how it stands."""

from __future__ import annotations

from orchestrator.verbs import options


def runs(runs_dir: options.RunsDir = options.DEFAULT_RUNS, json: options.Json = False) -> int:
    """List every run below the runs folder: its state, step, losses, age and size.

    States: [bold]running[/bold]; [bold]finished[/bold]; [bold]stopped[/bold] (on request) and
    [bold]interrupted[/bold] (killed), which both go on with `orchestrate train NAME`; [bold]failed[/bold];
    [bold]damaged[/bold] (its files cannot be read).

    [bold]Examples[/bold]

      orchestrate runs
      orchestrate runs --runs-dir /data/runs --json
    """
    from orchestrator.console import out, print_json
    from orchestrator.runs import find_runs
    from orchestrator.runs_table import runs_table

    found = find_runs(runs_dir.absolute())
    if json:
        print_json([run.to_json() for run in found])
        return 0
    if not found:
        out().print(f"No runs in {runs_dir.absolute()}. Start one: orchestrate train --name first-run", soft_wrap=True)
        return 0
    runs_table(found, out())
    return 0


def status(name: options.RunName, runs_dir: options.RunsDir = options.DEFAULT_RUNS, json: options.Json = False) -> int:
    """Show one run in detail: progress, who holds it, its last checkpoint, and how to go on.

    [bold]Examples[/bold]

      orchestrate status first-run
      orchestrate status first-run --json
    """
    from orchestrator.console import out, print_json
    from orchestrator.runs_table import status_table
    from orchestrator.status import read_status

    found = read_status(runs_dir.absolute(), name)
    if json:
        print_json(found.to_json())
        return 0
    status_table(found, out())
    return 0
