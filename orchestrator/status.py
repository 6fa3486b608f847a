"""One run in detail."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.closing_table import pointed_at, runs_dir_option
from orchestrator.experiment import SWEEP
from orchestrator.runs import RunSummary, existing_run, is_sweep, name_in, read_object, run_folder, summarize


@dataclass(frozen=True)
class CheckpointLine:
    """A committed checkpoint as its folder shows it; its sums are verified when it is loaded, not here."""

    path: str
    step: int
    size_bytes: int
    problem: str | None


@dataclass(frozen=True)
class Status:
    """What `orchestrate status` shows."""

    run: RunSummary
    holder: dict[str, Any] | None
    """generation, pid, host of who writes now"""
    tokens: int | None
    phase: str | None
    metrics: dict[str, Any]
    latest: str | None
    best: str | None
    checkpoints: tuple[CheckpointLine, ...]
    fingerprint: str | None
    created: Any
    mlflow_run_id: str | None
    tracking_uri: str | None
    next: str
    """what to do now, in a sentence with a command"""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_status(runs_dir: Path, name: str) -> Status:
    """Everything one run's or sweep's folder tells. UserError where there is none; broken files are named."""
    sweep = run_folder(runs_dir, name_in(runs_dir, name))
    if is_sweep(sweep):
        return _status_of_sweep(runs_dir, sweep)
    folder = existing_run(runs_dir, name)
    run = summarize(runs_dir, folder)
    ignored: list[str] = []
    identity = read_object(folder / "identity.json", ignored)
    outcome = read_object(folder / "outcome.json", ignored)
    newest = newest_row(folder / "metrics.jsonl")
    metrics = outcome.get("metrics") if isinstance(outcome.get("metrics"), dict) else None
    return Status(
        run=run,
        holder=_holder(folder) if run.state == "running" else None,
        tokens=newest.get("tokens", outcome.get("tokens")),
        phase=newest.get("phase"),
        metrics=metrics or {key: value for key, value in newest.items() if "/" in key},
        latest=pointed_at(folder, "latest"),
        best=pointed_at(folder, "best"),
        checkpoints=checkpoint_lines(folder / "checkpoints"),
        fingerprint=identity.get("fingerprint"),
        created=identity.get("created"),
        mlflow_run_id=identity.get("mlflow_run_id"),
        tracking_uri=identity.get("tracking_uri"),
        next=next_step(run, name_in(runs_dir, name), runs_dir_option(str(runs_dir))),
    )


def _status_of_sweep(runs_dir: Path, folder: Path) -> Status:
    from orchestrator.sweeps.standing import tokens_of

    run, identity = summarize(runs_dir, folder), read_object(folder / SWEEP, [])
    return Status(
        run=run,
        holder=_holder(folder) if run.state == "running" else None,
        tokens=tokens_of(folder),
        phase=None,
        metrics={},
        latest=None,
        best=None,
        checkpoints=(),
        fingerprint=identity.get("fingerprint"),
        created=identity.get("created"),
        mlflow_run_id=identity.get("mlflow_run_id"),
        tracking_uri=identity.get("tracking_uri"),
        next=next_of_sweep(run, runs_dir_option(str(runs_dir))),
    )


def newest_row(path: Path) -> dict[str, Any]:
    """The newest values of the record; {} where there is none."""
    from trainers.record import last_row

    return last_row(path) or {}


def checkpoint_lines(folder: Path) -> tuple[CheckpointLine, ...]:
    """Every committed checkpoint of a run, oldest first."""
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return tuple(_checkpoint_line(path) for path in found if path.is_dir())


def _checkpoint_line(path: Path) -> CheckpointLine:
    digits = path.name.removeprefix("step-")
    files = [file for file in path.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return CheckpointLine(str(path), int(digits) if digits.isdigit() else -1, size, _checkpoint_problem(path))


def _checkpoint_problem(path: Path) -> str | None:
    """What is visibly wrong: a missing manifest, a file that is missing or of another size. Hashes are not checked."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
        for name, entry in files.items():
            size = entry["size"] if isinstance(entry, dict) else None
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if size is not None and file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, LookupError, AttributeError, TypeError):
        return "manifest.json cannot be read"
    return None


def next_step(run: RunSummary, name: str, where: str) -> str:
    """What to do now with a run in this state."""
    match run.state:
        case "running":
            return "It is at work. Ctrl-C in its terminal (or SIGTERM) saves a checkpoint and stops it."
        case "finished":
            return f"orchestrate generate {name}{where} --prompt 'Once upon a time'"
        case "damaged":
            return "Repair or move its folder away; its checkpoints may still be sound (orchestrate generate)."
        case "failed":
            return f"Lower optim.lr or mend what it says above, then: orchestrate train {name}{where}"
        case "stopped" | "interrupted":
            return f"orchestrate train {name}{where}"


def next_of_sweep(run: RunSummary, where: str) -> str:
    """What to do now with a sweep in this state."""
    match run.state:
        case "running":
            return "It is at work. Ctrl-C in its terminal (or SIGTERM) saves its trials and stops it."
        case "stopped" | "interrupted":
            return f"The command that began it goes on. So far: orchestrate report {run.name}{where}"
        case "finished" | "failed":
            return f"orchestrate report {run.name}{where}"
        case "damaged":
            return "Repair or move its folder away; its trials are runs of their own (orchestrate generate)."


def _holder(folder: Path) -> dict[str, Any] | None:
    from trainers.claim import holder

    held_by = holder(folder)
    if held_by is None:
        return None
    return {"generation": held_by.generation, "pid": held_by.pid, "host": held_by.host}
