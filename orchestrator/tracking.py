"""MLflow, as far as this project knows it: a store, a run in it, and the two ways in which it can let us down.

The only file that imports mlflow, and only inside functions: importing it and its SQLAlchemy models costs 2.5 s, which
the driver spends in a thread while Ray starts. Params and tags pass `redact`; files are sent as they are.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from orchestrator.provenance import flatten
from orchestrator.redaction import REDACTED, redact, redact_mapping
from orchestrator.store_file import creating, sqlite_path, sqlite_uri
from orchestrator.store_values import (
    MAX_METRICS,
    MAX_PARAM_CHARS,
    MAX_PARAMS,
    MAX_TAG_CHARS,
    batches,
    checkpoint_link,
    clip,
    is_row,
    legal_name,
    numbers_of,
)
from trainers.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

EndState = Literal["FINISHED", "FAILED", "KILLED"]

STOP_REASON = "stop_reason"
RUN_PATH = "run_path"  # the tag that names the run's folder
PARENT = "mlflow.parentRunId"
EXPERIMENT_KIND = "mlflow.experimentKind"  # without it the UI shows an experiment as one of language-model apps
WAY_OUT = "Set MLFLOW_TRACKING_URI to a store that answers, or unset it to use a file in the runs folder."

_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_IMPORTING = threading.Lock()
# Errors of which waiting cures nothing: the run was deleted, or MLflow will never take this value.
_REFUSALS = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"})


class TrackingUnavailable(RuntimeError):
    """The store cannot be reached or is locked: the same call may succeed later."""


class TrackingRefused(RuntimeError):
    """The store answered and will never take this: the run was deleted there, or a value breaks its rules."""


class StoreAway(UserError):
    """TrackingUnavailable, to whoever needs a run opened now: a command that begins cannot, one at work may wait."""


# ---- the store --------------------------------------------------------------------------------------------------


def open_store(runs_dir: Path) -> Store:
    """The store that MLFLOW_TRACKING_URI names, or else a SQLite file in `runs_dir`, made and migrated if need be.

    May be called from any thread, and by several processes at once. Raises UserError where the store cannot be
    reached.
    """
    named = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    uri = named or sqlite_uri(runs_dir.absolute() / "mlflow.db")
    database = sqlite_path(uri)
    if database is None:
        return _first_contact(uri, None if _is_server(uri) else runs_dir.absolute() / "mlartifacts")
    query = uri.partition("?")[2]
    uri = sqlite_uri(database) + (f"?{query}" if query else "")
    way_out = WAY_OUT if named else "Choose another --runs-dir, or set MLFLOW_TRACKING_URI to a store that answers."
    with creating(database, way_out):
        return _first_contact(uri, database.parent / "mlartifacts")


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))


def _first_contact(uri: str, artifacts: Path | None) -> Store:
    if uri.startswith("file:") or not ("://" in uri or uri.startswith("databricks")):
        raise UserError(
            f"MLFLOW_TRACKING_URI={redact(uri)} is a folder, and MLflow's file store keeps a metric twice when it is "
            f"sent twice. {WAY_OUT}"
        )
    try:
        client = _connect(uri)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the MLflow store {redact(uri)} needs the Python package {error.name}: pip install it."
        ) from error
    except (TrackingUnavailable, TrackingRefused) as error:
        raise UserError(f"the MLflow store {redact(uri)} cannot be used: {error}. {WAY_OUT}") from error
    return Store(uri, client, artifacts)


def _knock(uri: str) -> None:
    """OSError where a database server does not listen: MLflow itself would go on trying to connect for 25 minutes."""
    parts = urlsplit(uri)
    port = parts.port or _DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    if parts.hostname and port and not _is_server(uri):
        socket.create_connection((parts.hostname, port), timeout=5).close()


def _connect(uri: str) -> MlflowClient:
    with _IMPORTING:
        _hush()
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):  # in case something imported mlflow before us
            logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    with _translated():
        _knock(uri)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def _hush() -> None:
    """Before the import: no telemetry, no log lines or links on the terminal, and short patience with a dead server.

    A person's own settings win. The feeder has a patience of its own, so a request need not wait four minutes.
    """
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what goes wrong is raised, and said by us, once
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


@contextmanager
def _translated() -> Iterator[None]:
    """Turn what MLflow raises into TrackingUnavailable or TrackingRefused, with one short line and no secret."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except MlflowException as error:
        kind = TrackingRefused if error.error_code in _REFUSALS else TrackingUnavailable
        raise kind(_first_line(error)) from error
    except (SQLAlchemyError, requests.RequestException, OSError) as error:
        raise TrackingUnavailable(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    """What went wrong, without the layers that report it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0]
    # SQLAlchemy: "(sqlite3.OperationalError) database is locked", at times below a line about its own ways.
    # urllib3: "...: [Errno 111] Connection refused'))".
    causes = (re.match(r"\([\w.]*Error\) (?P<cause>.*)|.*\[Errno -?\d+\] (?P<errno>[^'\")]+)", one) for one in lines)
    if found := next(filter(None, causes), None):
        line = found["cause"] or found["errno"]
    return redact(line)[:300].rstrip(". ")


class Store:
    """A place for runs; made by `open_store`."""

    def __init__(self, uri: str, client: MlflowClient, artifacts: Path | None):
        self.uri = uri
        self.client = client
        self._artifacts = artifacts
        """where a new experiment keeps its files; None: the server decides"""

    def open_run(
        self,
        experiment: str,
        run_name: str,
        *,
        run_id: str | None,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        parent_run_id: str | None = None,
        is_new: bool = False,
    ) -> TrackedRun:
        """Go on with `run_id` where the store has it, else with a run that was begun and never used, else a new one.

        The run is RUNNING afterwards. A param that changed keeps its first value, and the new one stands in the tag
        `param_update.NAME`. `is_new`: it was surely not begun before, so that nothing is looked for.
        MLFLOW_EXPERIMENT_NAME wins over `experiment`. Raises StoreAway where the store does not answer, and UserError
        where it refuses.
        """
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment
        tags = redact_mapping({key: str(value) for key, value in tags.items()})
        tags |= {PARENT: parent_run_id} if parent_run_id else {}
        try:
            with _translated():
                found = None if is_new else self._find(experiment, run_name, run_id, tags)
                run = found or self._create(experiment, run_name, tags)
                tracked = TrackedRun(self, run, attached=found is not None)
                tracked._begin(run, tags, params)
        except (TrackingUnavailable, TrackingRefused) as error:
            kind = StoreAway if isinstance(error, TrackingUnavailable) else UserError
            raise kind(f"the MLflow store {redact(self.uri)} cannot be used: {error}. {WAY_OUT}") from error
        return tracked

    def _find(self, experiment: str, run_name: str, run_id: str | None, tags: Mapping[str, str]) -> Run | None:
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return self._find_unused(experiment, run_name, tags)
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None  # another store, or one that was cleared: the record is sent there from its beginning
        if run.info.lifecycle_stage == "deleted":
            self.client.restore_run(run_id)
        return run

    def _find_unused(self, experiment: str, run_name: str, tags: Mapping[str, str]) -> Run | None:
        """A run of this folder whose driver died before it could note the id; or a phase's run of this parent."""
        known = self.client.get_experiment_by_name(experiment)
        by = RUN_PATH if RUN_PATH in tags else PARENT
        if known is None or by not in tags or {'"', "'"} <= set(tags[by]):
            return None
        quote = '"' if "'" in tags[by] else "'"  # MLflow's filters know no escape
        for run in self.client.search_runs([known.experiment_id], f"tags.`{by}` = {quote}{tags[by]}{quote}"):
            same = run.info.run_name == run_name and run.data.tags.get("fingerprint") == tags.get("fingerprint")
            if same and (by == PARENT or (run.info.status == "RUNNING" and not run.data.metrics)):
                return run
        return None

    def _create(self, experiment: str, run_name: str, tags: Mapping[str, str]) -> Run:
        clipped = {key: clip(value, MAX_TAG_CHARS) for key, value in tags.items()}
        return self.client.create_run(self._experiment_id(experiment), tags=clipped, run_name=run_name)

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        known = self.client.get_experiment_by_name(name)
        if known is None:
            try:
                return self.client.create_experiment(
                    name,
                    artifact_location=self._artifact_location(),
                    tags={EXPERIMENT_KIND: "custom_model_development"},
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                known = self.client.get_experiment_by_name(name)  # another driver was first
                assert known is not None
        if known.lifecycle_stage == "deleted":
            self.client.restore_experiment(known.experiment_id)
        return known.experiment_id

    def _artifact_location(self) -> str | None:
        chosen = os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT")
        if chosen or self._artifacts is None:
            return chosen
        self._artifacts.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._artifacts.as_uri()


# ---- a run ------------------------------------------------------------------------------------------------------


class TrackedRun:
    """One run in the store. Every method raises TrackingUnavailable where the store is away and TrackingRefused where
    it will not have what is sent; each may be called again with the same arguments without harm."""

    def __init__(self, store: Store, run: Run, *, attached: bool):
        self.store = store
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.attached = attached
        """whether the run was there before"""
        steps = [metric.step for metric in run.data._metric_objs if metric.key.startswith("system/")]
        self.next_system_step: int = max(steps, default=-1) + 1

    def _begin(self, run: Run, tags: Mapping[str, str], params: Mapping[str, Any]) -> None:
        if run.info.status != "RUNNING":
            self.store.client.update_run(self.run_id, status="RUNNING")
        wanted = _legal_params(params)
        self._log_params({key: value for key, value in wanted.items() if key not in run.data.params})
        updates = {
            f"param_update.{key}": value
            for key, value in wanted.items()
            if run.data.params.get(key, value) != value or f"param_update.{key}" in run.data.tags
        }
        if self.attached:
            self.set_tags({**tags, **updates})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """The settings of a run that has none yet."""
        with _translated():
            self._log_params(_legal_params(params))

    def _log_params(self, legal: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        for batch in batches([Param(key, value) for key, value in legal.items()], MAX_PARAMS):
            self.store.client.log_batch(self.run_id, params=batch)

    def url_hint(self) -> str:
        """Where to look at this run: its address, and before that the command that serves it where no server runs."""
        page = f"#/experiments/{self.experiment_id}/runs/{self.run_id}"
        if _is_server(self.store.uri):
            address = redact(self.store.uri).replace(f"{REDACTED}@", "")
            return f"{address.rstrip('/')}/{page}"
        uri = shlex.quote(redact(self.store.uri))
        return f"mlflow ui --backend-store-uri {uri}   then http://127.0.0.1:5000/{page}"

    def log_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Send rows of metrics.jsonl: every number in them under its name, at the row's step and first time.

        Sent again they change nothing, because the store keeps one of equal (key, timestamp, step, value).
        """
        metrics = [metric for row in rows if is_row(row) for metric in _metrics_of(row)]
        with _translated():
            for batch in batches(metrics, MAX_METRICS):
                self.store.client.log_batch(self.run_id, metrics=batch)

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Copy a file, or what a folder holds, into the run's artifacts; FileNotFoundError where there is nothing."""
        path.stat()
        with _translated():
            if path.is_dir():
                self.store.client.log_artifacts(self.run_id, str(path), artifact_path)
            else:
                self.store.client.log_artifact(self.run_id, str(path), artifact_path)

    def log_link(self, name: str, target: Path) -> None:
        """Point at a checkpoint without copying it: `checkpoints/NAME.json` and the tag `checkpoint.NAME`.

        `target` is its folder.
        """
        link = checkpoint_link(target)
        with _translated():
            self.store.client.log_text(self.run_id, json.dumps(link, indent=2) + "\n", f"checkpoints/{name}.json")
        self.set_tags({f"checkpoint.{name}": link["path"]})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        legal = {legal_name(key): clip(value, MAX_TAG_CHARS) for key, value in redact_mapping(tags).items()}
        with _translated():
            for batch in batches([RunTag(key, value) for key, value in legal.items()], MAX_PARAMS):
                self.store.client.log_batch(self.run_id, tags=batch)

    def put_off(self) -> None:
        """Not begun yet: a phase behind the one where its run stopped."""
        with _translated():
            self.store.client.update_run(self.run_id, status="SCHEDULED")

    def finish(self, status: EndState, stop_reason: str) -> None:
        """How the run ended, truthfully; the reason stands in the tag `stop_reason`."""
        self.set_tags({STOP_REASON: stop_reason})
        with _translated():
            self.store.client.set_terminated(self.run_id, status)


def close_orphan(store: Store, run_id: str, reason: str) -> bool:
    """End a run that a killed driver left RUNNING, and its phases' runs, as KILLED; False where it had ended."""
    with _translated():
        run = store.client.get_run(run_id)
        nested = store.client.search_runs([run.info.experiment_id], f"tags.`{PARENT}` = '{run_id}'")
    left = [one for one in (run, *nested) if one.info.status == "RUNNING"]
    for one in left:
        TrackedRun(store, one, attached=True).finish("KILLED", reason)
    return run in left


def _legal_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Flat, without secrets, as MLflow takes them."""
    flat = redact_mapping(flatten(params))
    return {legal_name(key): clip(value, MAX_PARAM_CHARS) for key, value in flat.items()}


def _metrics_of(row: Mapping[str, Any]) -> list[Metric]:
    from mlflow.entities import Metric

    step, time_ms = int(row["step"]), int(row["time_ms"])
    return [Metric(legal_name(key), value, time_ms, step) for key, value in numbers_of(row).items()]
