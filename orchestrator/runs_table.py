"""`orchestrate runs` and `orchestrate status` on the screen."""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.console import count, duration, size
from orchestrator.display import plain
from orchestrator.runs import RunSummary
from orchestrator.status import Status

STATE_STYLES = {
    "running": "bold cyan",
    "finished": "green",
    "stopped": "yellow",
    "interrupted": "yellow",
    "failed": "red",
    "damaged": "red",
}


def runs_table(runs: list[RunSummary], console: Console) -> None:
    """One line a run, the newest first; below, what is wrong with those that failed or are damaged."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for heading in ("step", "loss", "val loss", "age", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            Text(plain(run.name)),
            Text(run.state, style=STATE_STYLES[run.state]),
            steps(run) + (" trials" if run.kind == "sweep" else ""),
            _loss(run.train_loss),
            _loss(run.val_loss),
            age(run),
            size(run.size_bytes),
        )
    console.print(table)
    for run in runs:
        if run.problem and run.state in ("failed", "damaged"):
            console.print(Text(f"{plain(run.name)} {run.state}: {plain(run.problem)}", style="dim"), soft_wrap=True)


def status_table(status: Status, console: Console) -> None:
    """Name and value, a line each; paths are never folded, so that they can be copied."""
    run = status.run
    rows = [
        (run.kind, run.name),
        ("state", run.state + (f": {run.problem}" if run.problem else "")),
        ("held by", f"process {status.holder['pid']} on {status.holder['host']}" if status.holder else ""),
        ("preset", run.preset or ""),
        (
            "trials" if run.kind == "sweep" else "step",
            steps(run) + (f" (phase {status.phase})" if status.phase and status.phase != "main" else ""),
        ),
        ("tokens seen", count(status.tokens) if status.tokens is not None else ""),
        ("train loss", _loss(run.train_loss)),
        ("best loss" if run.kind == "sweep" else "val loss", _loss(run.val_loss)),
        ("last sign", f"{age(run)} ago" if run.updated else ""),
        ("folder", run.path),
        ("on disk", size(run.size_bytes)),
        ("latest", status.latest or ("" if run.kind == "sweep" else "no checkpoint yet")),
        ("best", status.best or ""),
        (
            "MLflow run",
            f"{status.mlflow_run_id} in {status.tracking_uri or '(unknown store)'}" if status.mlflow_run_id else "",
        ),
        ("fingerprint", status.fingerprint or ""),
    ]
    rows += [("damaged", f"{line.path}: {line.problem}") for line in status.checkpoints if line.problem]
    rows += [("next", status.next)]
    shown = [(name, value) for name, value in rows if value and value != "-"]
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        style = STATE_STYLES[run.state] if name == "state" else "cyan" if name == "next" else ""
        console.print(Text.assemble((f"{name:<{width}}  ", "dim"), (plain(value), style)), soft_wrap=True)


def steps(run: RunSummary) -> str:
    if run.step is None:
        return "-"
    return f"{count(run.step)}/{count(run.total_steps)}" if run.total_steps else count(run.step)


def age(run: RunSummary) -> str:
    return duration(max(0.0, time.time() - run.updated)) if run.updated else "-"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
