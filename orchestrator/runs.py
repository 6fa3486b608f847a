"""The runs folder: names that are safe on a disk, every run below it, and how each one stands.

Reads whatever is there and never fails on a broken or foreign folder: what cannot be read becomes the state
`damaged` with its reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from orchestrator.experiment import SWEEP, confined
from trainers.errors import ConfigError, UserError

State = Literal["running", "stopped", "finished", "failed", "interrupted", "damaged"]
MARKERS = ("identity.json", "config.yaml", "claim")  # any of these makes a folder a run
DEPTH = 2  # RUNS/NAME and RUNS/SWEEP/TRIAL
BLOCK = 1 << 16


@dataclass(frozen=True)
class RunSummary:
    """One line of `orchestrate runs`."""

    name: str
    """relative to the runs folder, so SWEEP/TRIAL for a trial"""
    path: str
    state: State
    problem: str | None
    """what is wrong with a damaged run, or why one stopped, failed or finished early"""
    preset: str | None
    step: int | None
    total_steps: int | None
    train_loss: float | None
    val_loss: float | None
    updated: float | None
    """seconds since the epoch of the newest sign of life"""
    size_bytes: int
    kind: Literal["run", "sweep"] = "run"
    """of a sweep the steps are its trials"""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ---- names ------------------------------------------------------------------------------------------


def run_folder(runs_dir: Path, name: str) -> Path:
    """Where the run `name` (or SWEEP/TRIAL) lives or would live; UserError for a name that could lead elsewhere."""
    parts = name.split("/")
    if len(parts) > DEPTH:
        raise UserError(f"{name[:60]!r} is too deep for a run's name: at most SWEEP/TRIAL.")
    folder = runs_dir
    try:
        for part in parts:
            folder = confined(folder, part)
    except ConfigError as error:
        raise error if len(parts) == 1 else UserError(f"{name[:60]!r}: {error}") from None
    return folder


def existing_run(runs_dir: Path, name: str) -> Path:
    """The folder of a run that is there; a path into the runs folder is understood as the run's name.

    Raises UserError with the nearest names where there is none.
    """
    folder = run_folder(runs_dir, name_in(runs_dir, name))
    if is_run(folder):
        return folder
    raise UserError(f"there is no run {name!r} in {runs_dir}.{suggestion(name, run_names(runs_dir))}")


def name_in(runs_dir: Path, text: str) -> str:
    """`runs/first-run/` -> `first-run`, where `runs` is the runs folder; any other text as it is."""
    root, path = os.path.abspath(runs_dir), os.path.abspath(text)
    text = text.rstrip("/") or text  # as a shell completes a folder
    if ("/" in text or os.sep in text) and path.startswith(root + os.sep):
        return Path(os.path.relpath(path, root)).as_posix()
    return text


def suggestion(name: str, known: list[str]) -> str:
    """' Did you mean a or b?', or ' There are: ...', or nothing; with a leading space."""
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f" Did you mean {' or '.join(close)}?"
    if not known:
        return ""
    more = f" and {len(known) - 8} more" if len(known) > 8 else ""
    return f" There are: {', '.join(known[:8])}{more}."


# ---- finding ----------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, whole or broken."""
    return any(os.path.lexists(folder / marker) for marker in MARKERS) and not is_sweep(folder)


def is_sweep(folder: Path) -> bool:
    return os.path.lexists(folder / SWEEP)


def run_names(runs_dir: Path) -> list[str]:
    """Names of every run below the runs folder, trials of sweeps included, sorted."""
    return sorted(folder.relative_to(runs_dir).as_posix() for folder in _folders(runs_dir, DEPTH))


def find_runs(runs_dir: Path) -> list[RunSummary]:
    """How every run below the runs folder stands, the one touched last first; a sweep is one of them, without its
    trials. No folder: no runs."""
    summaries = [summarize(runs_dir, folder) for folder in _folders(runs_dir, DEPTH, into_sweeps=False)]
    return sorted(summaries, key=lambda run: (-(run.updated or 0.0), run.name))


def _folders(parent: Path, depth: int, *, into_sweeps: bool = True) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
    except OSError:
        return  # no such folder, or not ours to read
    for entry in entries:
        if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
            continue
        folder = Path(entry.path)
        if is_run(folder) or (is_sweep(folder) and not into_sweeps):
            yield folder
        elif depth > 1:
            yield from _folders(folder, depth - 1, into_sweeps=into_sweeps)


# ---- reading one run --------------------------------------------------------------------------------


def summarize(runs_dir: Path, folder: Path) -> RunSummary:
    """How one run or sweep stands; never raises for what it finds on the disk."""
    if is_sweep(folder):
        from orchestrator.sweeps.standing import summarize_sweep

        return summarize_sweep(runs_dir, folder)
    problems: list[str] = []
    identity = read_object(folder / "identity.json", problems)
    outcome = read_object(folder / "outcome.json", problems)
    config = read_config(folder / "config.yaml", problems)
    newest = last_values(folder / "metrics.jsonl", ("step", "train/loss", "val/loss"), problems)
    state = decide_state(live=is_live(folder, problems), outcome=outcome, readable=not problems)
    return RunSummary(
        name=folder.relative_to(runs_dir).as_posix(),
        path=str(folder.absolute()),
        state=state,
        problem="; ".join(problems) or _reason(state, outcome),
        preset=_text(config.get("preset")),
        step=_whole(newest.get("step")) if "step" in newest else _whole(outcome.get("step")),
        total_steps=total_steps(config, identity, outcome),
        train_loss=newest.get("train/loss"),
        val_loss=newest.get("val/loss"),
        updated=newest_time(folder, ("metrics.jsonl", "outcome.json", "claim", "identity.json", "config.yaml")),
        size_bytes=disk_size(folder),
    )


def decide_state(*, live: bool, outcome: dict[str, Any], readable: bool) -> State:
    """The state from the facts: a live claim outranks an old outcome; no outcome and nobody there is interrupted."""
    if live:
        return "running"
    if not readable:
        return "damaged"
    match outcome.get("state"):
        case "finished":
            return "finished"
        case "stopped":
            return "stopped"
        case "failed":
            return "failed"
        case None if not outcome:
            return "interrupted"
        case _:
            return "damaged"


def is_live(folder: Path, problems: list[str]) -> bool:
    """Whether a process holds the run; one on another host, which cannot be seen from here, counts as alive."""
    from trainers.claim import holder

    try:
        held_by = holder(folder)
    except OSError as error:
        problems.append(f"claim cannot be read ({_brief(error)})")
        return False
    return held_by is not None and held_by.alive is not False


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object from a file; {} where there is none, and {} with a problem noted where it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({_brief(error)})")
        return {}
    if isinstance(value, dict):
        return value
    problems.append(f"{path.name} is not a JSON object")
    return {}


def read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    """The run's configuration as plain data, unvalidated; {} with a problem noted where it is missing or broken."""
    from trainers.config_io import load_yaml

    try:
        value: object = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append("config.yaml is missing")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({_brief(error)})")
        return {}
    if isinstance(value, dict):
        return value
    problems.append(f"{path.name} is not a mapping")
    return {}


def last_values(path: Path, names: tuple[str, ...], problems: list[str]) -> dict[str, float]:
    """The newest value of each name in a metrics.jsonl, read from its end; torn and foreign lines are passed over."""
    found: dict[str, float] = {}
    try:
        for line in lines_backwards(path):
            row = _row(line)
            for name in names:
                value = row.get(name)
                if name not in found and (number := _number(value)) is not None:
                    found[name] = number
            if len(found) == len(names):
                break
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({_brief(error)})")
    return found


def lines_backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file, the last one first, in bounded memory for lines of bounded length."""
    with path.open("rb") as handle:
        position = handle.seek(0, os.SEEK_END)
        tail = b""
        while position > 0:
            start = max(0, position - BLOCK)
            handle.seek(start)
            pieces = (handle.read(position - start) + tail).split(b"\n")
            tail = pieces[0]
            yield from reversed(pieces[1:])
            position = start
        if tail:
            yield tail


def total_steps(config: dict[str, Any], *records: dict[str, Any]) -> int | None:
    """Steps the run is to take: as recorded, else as its configuration says them; None for epochs and tokens."""
    for record in reversed(records):
        if (recorded := _whole(record.get("total_steps"))) is not None:
            return recorded
    of_run = config.get("budget")
    phases = config.get("phases") or [{}]
    if not isinstance(phases, (list, tuple)):
        return None
    budgets = [phase.get("budget") or of_run for phase in phases if isinstance(phase, dict)]
    steps = [_whole(budget.get("steps")) if isinstance(budget, dict) else None for budget in budgets]
    known = [step for step in steps if step is not None]
    return sum(known) if known and len(known) == len(phases) else None


def disk_size(folder: Path) -> int:
    """Bytes of disk that a folder takes; what vanishes while it looks counts nothing."""
    total = 0
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return 0
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                total += disk_size(Path(entry.path))
            else:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue
    return total


def newest_time(folder: Path, names: tuple[str, ...]) -> float | None:
    """When the newest of these files changed, in seconds since the epoch."""
    times = []
    for name in names:
        try:
            times.append(os.stat(folder / name).st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _reason(state: State, outcome: dict[str, Any]) -> str | None:
    if state == "damaged":
        return f"outcome.json says state {outcome.get('state')!r}, which is none of ours"
    reason = _text(outcome.get("reason"))
    return reason if state in ("stopped", "failed", "finished") and reason != "completed" else None


def _number(value: object) -> float | None:
    """A metric's value; the record writes those JSON has no numbers for as text."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return (
        int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value - value == 0 else None
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _brief(error: Exception) -> str:
    text = str(error).splitlines()
    return (text[0] if text else type(error).__name__)[:160]


# ---- the folder itself ------------------------------------------------------------------------------


def check_runs_dir(runs_dir: Path) -> None:
    """Raises UserError where runs could not be written into `runs_dir`, which need not exist yet."""
    folder = nearest_folder(runs_dir)
    if not folder.is_dir():
        raise UserError(f"--runs-dir {runs_dir}: {folder} is a file, not a folder. Choose another --runs-dir.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--runs-dir {runs_dir}: no permission to write in {folder}. Choose another --runs-dir.")


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest parent that is there."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path
