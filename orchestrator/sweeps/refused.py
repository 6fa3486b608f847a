"""A point that makes no run, as MLflow has it: nothing of it is trained, and the trial is there like any other."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

from orchestrator.experiment import write_atomically
from orchestrator.sweeps.history import History, Trial, seed_names
from orchestrator.sweeps.sweep import Sweep
from orchestrator.sweeps.training import tags_of, told
from orchestrator.tracker import OpeningStore
from trainers.identity import read_identity, read_json

REFUSED = "refused.json"
"""in the folder that the training would have had: its run in MLflow, and whether that has been told all"""


def enter_refused(sweep: Sweep, trial: Trial, opening: OpeningStore, parent_run_id: str) -> None:
    """A failed run below the sweep's for each seed of a refused trial; told again, or after a kill, still one.

    Raises UserError where the store cannot be used.
    """
    from orchestrator.tracking import TrackingRefused, TrackingUnavailable

    assert trial.ending is not None
    for index, name in enumerate(_folders(sweep, trial)):
        path = sweep.folder / name / REFUSED
        noted = read_json(path) or {}
        if noted.get("ended"):
            continue
        tags = {"preset": sweep.base.preset, "run_path": str(path.parent), "error": trial.ending.message}
        run = opening.get().open_run(
            sweep.base.preset.split("/")[0],
            f"{sweep.name}/{name}",
            run_id=noted.get("mlflow_run_id"),
            tags=tags_of(sweep, trial, name, index) | tags,
            params=trial.params,
            parent_run_id=parent_run_id,
        )
        path.parent.mkdir(exist_ok=True)
        noted = {"time_ms": time.time_ns() // 1_000_000, **noted, "mlflow_run_id": run.run_id}
        write_atomically(path, json.dumps(noted) + "\n")
        with contextlib.suppress(TrackingUnavailable, TrackingRefused):
            run.log_metrics([{"step": 0, "time_ms": noted["time_ms"], **told(trial.ending, sweep.settings.seeds)}])
            run.finish("FAILED", trial.ending.reason)
            write_atomically(path, json.dumps({**noted, "ended": True}) + "\n")


def untold(sweep: Sweep, history: History) -> Iterator[Trial]:
    """The refused trials of which MLflow has not heard all."""
    for trial in history.ended():
        if trial.ending is not None and trial.ending.reason == "error":
            folders = [sweep.folder / name for name in _folders(sweep, trial)]
            if not any(read_identity(folder) for folder in folders) and not all(
                (read_json(folder / REFUSED) or {}).get("ended") for folder in folders
            ):
                yield trial


def _folders(sweep: Sweep, trial: Trial) -> list[str]:
    return seed_names(trial.number, sweep.settings.seeds, len(trial.lineage))
