"""What the person holds when a training ends: where everything is, how good it got, and what to type next."""

from __future__ import annotations

import json
import math
import os
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from orchestrator import console as terminals
from orchestrator.console import count, duration
from orchestrator.display import plain
from orchestrator.experiment import OUTCOME
from orchestrator.runs import run_folder
from trainers.identity import IDENTITY, read_json

SHOWN_METRICS = (
    ("train/loss", "train loss"),
    ("val/loss", "validation loss"),
    ("val/perplexity", "perplexity"),
    ("val/bits_per_byte", "bits per byte"),
    ("val/bits_per_character", "bits per character"),
    ("val/accuracy", "accuracy"),
)
SAMPLE_CHARACTERS = 600
HEADLINES = {
    "finished": ("finished", "bold green"),
    "stopped": ("stopped, and can go on", "bold yellow"),
    "failed": ("failed", "bold red"),
}


@dataclass(frozen=True)
class Closing:
    """How a run ended. `state` is finished, stopped or failed; paths are absolute."""

    name: str
    runs_dir: str
    state: str
    reason: str
    step: int
    tokens: int
    total_steps: int | None = None
    seconds: float | None = None
    """of this attempt"""
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: str | None = None
    best_checkpoint: str | None = None
    plots: str | None = None
    samples: str | None = None
    sample_text: str | None = None
    tracking_uri: str | None = None
    mlflow_run_id: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def run_dir(self) -> str:
        return os.path.join(self.runs_dir, self.name)

    def to_json(self) -> dict[str, Any]:
        """What `orchestrate train --json` prints."""
        return asdict(self) | {"run_dir": self.run_dir, "next": self.commands()}

    def commands(self) -> dict[str, str]:
        """What to type next, ready to paste."""
        where = runs_dir_option(self.runs_dir)
        name = shlex.quote(self.name)
        commands = {}
        if self.state == "finished":
            commands["generate"] = f"orchestrate generate {name}{where} --prompt 'Once upon a time'"
            commands["evaluate"] = f"orchestrate evaluate {name}{where}"
        else:
            commands["continue"] = f"orchestrate train {name}{where}"
            if self.checkpoint is not None:
                commands["generate"] = f"orchestrate generate {name}{where} --prompt 'Once upon a time'"
        if self.tracking_uri is not None and self.tracking_uri.startswith("sqlite:"):
            commands["mlflow"] = f"mlflow ui --backend-store-uri {shlex.quote(self.tracking_uri)}"
        return commands


def closing_table(closing: Closing, console: Console | None = None) -> None:
    """Print it. Long paths are never cut or folded by us, so that they can be copied from any width.

    A reader that is gone changes nothing: the exit code says how the run ended.
    """
    console = console or terminals.out()
    try:
        _print(closing, console)
    except BrokenPipeError:
        terminals.silence(1)


def _print(closing: Closing, console: Console) -> None:
    word, style = HEADLINES[closing.state]
    of = f" of {count(closing.total_steps)}" if closing.total_steps else ""
    took = f" in {duration(closing.seconds)}" if closing.seconds is not None else ""
    why = f" ({plain(closing.reason)})" if closing.reason and closing.reason != "completed" else ""
    console.print()
    headline = Text.assemble((f"{closing.name} {word}", style), f"{why}: step {count(closing.step)}{of}{took}")
    console.print(headline, soft_wrap=True)
    console.print()
    _rows(console, _results(closing))
    for note in closing.notes:
        console.print(Text(plain(note), style="yellow"), soft_wrap=True)
    if closing.sample_text:
        console.print()
        console.print(Text("  a sample of its text", style="dim"))
        console.print(Text(indented(closing.sample_text)), soft_wrap=True)
    console.print()
    _rows(console, list(closing.commands().items()), style="cyan")


def closing_of(runs_dir: Path, name: str, *, seconds: float | None = None, notes: tuple[str, ...] = ()) -> Closing:
    """The closing of a run as its folder tells it (outcome.json, identity.json, checkpoints, samples)."""
    folder = run_folder(runs_dir, name)
    outcome, identity = read_json(folder / OUTCOME) or {}, read_json(folder / IDENTITY) or {}
    plots, samples = folder / "plots", folder / "samples"
    return Closing(
        name=name,
        runs_dir=str(runs_dir.absolute()),
        state=outcome.get("state", "failed"),
        reason=outcome.get("reason", ""),
        step=outcome.get("step", 0),
        tokens=outcome.get("tokens", 0),
        total_steps=identity.get("total_steps"),
        seconds=seconds,
        metrics=outcome.get("metrics", {}),
        checkpoint=pointed_at(folder, "latest"),
        best_checkpoint=pointed_at(folder, "best"),
        plots=str(plots) if plots.is_dir() and any(plots.iterdir()) else None,
        samples=str(samples) if samples.is_dir() and any(samples.iterdir()) else None,
        sample_text=last_sample(samples),
        tracking_uri=identity.get("tracking_uri"),
        mlflow_run_id=identity.get("mlflow_run_id"),
        notes=notes,
    )


def pointed_at(folder: Path, pointer: str) -> str | None:
    """The checkpoint that `checkpoints/latest` or `best` names; None where there is none."""
    try:
        name = (folder / "checkpoints" / pointer).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    path = folder / "checkpoints" / name
    return str(path) if name.startswith("step-") and path.is_dir() else None


def last_sample(samples: Path) -> str | None:
    """What the model wrote at its last evaluation, after its prompt; None where nothing readable was written."""
    files = sorted(samples.glob("step-*.json")) if samples.is_dir() else []
    if not files:
        return None
    try:
        first = json.loads(files[-1].read_text(encoding="utf-8"))[0]
        return str(first["prompt"]) + str(first["generated"])
    except (ValueError, LookupError, TypeError):
        return None


def _results(closing: Closing) -> list[tuple[str, str]]:
    scores = [
        f"{label} {closing.metrics[name]:.4g}"
        for name, label in SHOWN_METRICS
        if math.isfinite(closing.metrics.get(name, math.nan))
    ]
    rows = [("scores", ", ".join(scores[:3])), ("", ", ".join(scores[3:]))]
    rows += [("tokens seen", count(closing.tokens))]
    rows += [("run", closing.run_dir)]
    rows += [("checkpoint", closing.checkpoint or "none yet")]
    if closing.best_checkpoint and closing.best_checkpoint != closing.checkpoint:
        rows.append(("best", closing.best_checkpoint))
    rows += [("plots", closing.plots or ""), ("samples", closing.samples or "")]
    if closing.mlflow_run_id:
        rows.append(("MLflow run", f"{closing.mlflow_run_id} in {closing.tracking_uri}"))
    return [(name, value) for name, value in rows if value]


def _rows(console: Console, rows: list[tuple[str, str]], style: str = "") -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        line = Text.assemble((f"  {name:<{width}}  ", "dim"), (plain(value), style))
        console.print(line, soft_wrap=True)


def runs_dir_option(runs_dir: str) -> str:
    """' --runs-dir X' where the command would not find the run otherwise, with a leading space; else nothing."""
    usual = os.environ.get("ORCHESTRATE_RUNS") or "runs"
    if Path(usual).absolute() == Path(runs_dir).absolute():
        return ""
    return f" --runs-dir {shlex.quote(runs_dir)}"


def indented(text: str) -> str:
    """A piece of generated text, framed by a bar on the left and without anything that drives a terminal."""
    cut = text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS].rsplit(" ", 1)[0] + " ..."
    return "\n".join(f"  | {plain(line)}" for line in cut.splitlines())
