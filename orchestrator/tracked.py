"""What stands in the MLflow store about runs that others wrote: sweeps, their trials, the history of a metric.

Reads only; `tracking.py` writes. Every function that asks the store raises UserError where it is away.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.redaction import redact
from orchestrator.store_file import sqlite_path
from orchestrator.tracking import PARENT, WAY_OUT, Store, TrackingRefused, TrackingUnavailable, _translated, open_store
from trainers.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities import Run

KIND = "kind"
"""the tag that tells a sweep's run from a trial's"""


@dataclass(frozen=True)
class StoredRun:
    """A run as the store has it now."""

    run_id: str
    experiment_id: str
    name: str
    status: str
    """RUNNING, SCHEDULED, FINISHED, FAILED or KILLED"""
    start_s: float
    """seconds since the epoch"""
    end_s: float | None
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    """the last value of each"""

    @property
    def ended(self) -> bool:
        return self.status in ("FINISHED", "FAILED", "KILLED")


def existing_store(runs_dir: Path) -> Store | None:
    """The store of a runs folder for someone who only looks; None where no run was ever tracked there."""
    named = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    database = sqlite_path(named) if named else runs_dir.absolute() / "mlflow.db"
    return open_store(runs_dir) if database is None or database.exists() else None


def runs_of_kind(store: Store, kind: str) -> list[StoredRun]:
    """Every run of a kind in every experiment, the one begun last first."""
    with _readable(store):
        return sorted(
            _search(store, list(_experiment_ids(store)), f"tags.{KIND} = '{kind}'"), key=lambda run: -run.start_s
        )


def children_of(store: Store, parent: StoredRun) -> list[StoredRun]:
    """The runs right below a run."""
    with _readable(store):
        return list(_search(store, [parent.experiment_id], f"tags.`{PARENT}` = '{parent.run_id}'"))


def is_tracked(store: Store, name: str) -> bool:
    """Whether any run bears this name."""
    if {'"', "'"} <= set(name):  # MLflow's filters know no escape
        return False
    quote = '"' if "'" in name else "'"
    with _readable(store):
        found = _search(store, list(_experiment_ids(store)), f"attributes.run_name = {quote}{name}{quote}")
        return next(found, None) is not None


def metric_history(store: Store, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) in the order of steps; of several values at a step the first written."""
    with _readable(store):
        written = store.client.get_metric_history(run_id, name)
    first: dict[int, float] = {}
    for metric in sorted(written, key=lambda metric: metric.timestamp):
        first.setdefault(metric.step, metric.value)
    return sorted(first.items())


@contextmanager
def _readable(store: Store) -> Iterator[None]:
    try:
        with _translated():
            yield
    except (TrackingUnavailable, TrackingRefused) as error:
        raise UserError(f"the MLflow store {redact(store.uri)} cannot be read: {error}. {WAY_OUT}") from error


def _experiment_ids(store: Store) -> Iterator[str]:
    token = None
    while True:
        page = store.client.search_experiments(page_token=token)
        yield from (experiment.experiment_id for experiment in page)
        token = page.token
        if not token:
            return


def _search(store: Store, experiments: list[str], condition: str) -> Iterator[StoredRun]:
    token = None
    while experiments:
        page = store.client.search_runs(experiments, condition, page_token=token)
        yield from map(_stored, page)
        token = page.token
        if not token:
            return


def _stored(run: Run) -> StoredRun:
    info, data = run.info, run.data
    return StoredRun(
        run_id=info.run_id,
        experiment_id=info.experiment_id,
        name=info.run_name or "",
        status=info.status,
        start_s=(info.start_time or 0) / 1000,
        end_s=info.end_time / 1000 if info.end_time else None,
        tags=dict(data.tags),
        params=dict(data.params),
        metrics=dict(data.metrics),
    )
