"""How a sweep stands, from its folder alone: its line in `orchestrate runs`, and what `orchestrate status` says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from orchestrator.experiment import SWEEP
from orchestrator.runs import RunSummary, State, disk_size, is_live, newest_time, read_config, read_object
from orchestrator.sweeps.desk import best_of
from orchestrator.sweeps.history import FAILED, History
from orchestrator.sweeps.journal import JOURNAL, read_history
from orchestrator.sweeps.settings import SweepSettings


def summarize_sweep(runs_dir: Path, folder: Path) -> RunSummary:
    """One line for all of a sweep; never raises for what it finds on the disk.

    `step` of `total_steps` are its trials, `val_loss` is the best of them.
    """
    problems: list[str] = []
    identity = read_object(folder / SWEEP, problems)
    config = read_config(folder / "config.yaml", problems)
    history = _history(folder, problems)
    settings = _settings(identity, problems)
    ended = sum(1 for _ in history.ended())
    preset = config.get("preset")
    return RunSummary(
        name=folder.relative_to(runs_dir).as_posix(),
        path=str(folder.absolute()),
        state=_state(folder, identity, settings, history, problems),
        problem="; ".join(problems) or None,
        preset=preset if isinstance(preset, str) else None,
        step=ended,
        total_steps=settings.trials if settings else None,
        train_loss=None,
        val_loss=_best(settings, history),
        updated=newest_time(folder, (JOURNAL, SWEEP, "claim")),
        size_bytes=disk_size(folder),
        kind="sweep",
    )


def tokens_of(folder: Path) -> int | None:
    """Tokens trained on so far, over all trials and seeds; None where nothing can be read."""
    settings = _settings(read_object(folder / SWEEP, []), [])
    trials = _history(folder, []).trials.values()
    return sum(trial.seen[-1].tokens for trial in trials if trial.seen) * settings.seeds if settings else None


def _state(
    folder: Path, identity: dict[str, Any], settings: SweepSettings | None, history: History, problems: list[str]
) -> State:
    from trainers.claim import holder

    if is_live(folder, problems):
        return "running"
    if problems or settings is None:
        return "damaged"
    if identity.get("finished") == settings.trials:
        return "finished"
    reasons = {trial.ending.reason for trial in history.ended() if trial.ending}
    if len(history.trials) >= settings.trials and not list(history.unfinished()) and reasons <= FAILED:
        return "failed"
    return "stopped" if holder(folder) is None else "interrupted"


def _best(settings: SweepSettings | None, history: History) -> float | None:
    best = best_of(history.ended(), settings) if settings else None
    if best is None or best.ending is None or settings is None or settings.objective.metric != "val/loss":
        return None
    return best.ending.values[0] if math.isfinite(best.ending.values[0]) else None


def _history(folder: Path, problems: list[str]) -> History:
    try:
        return read_history(folder / JOURNAL)
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        problems.append(f"{JOURNAL} cannot be read ({type(error).__name__})")
        return History()


def _settings(identity: dict[str, Any], problems: list[str]) -> SweepSettings | None:
    try:
        return SweepSettings.model_validate(identity.get("settings"))
    except ValueError:
        if not problems:
            problems.append(f"{SWEEP} has no settings that can be read")
        return None
