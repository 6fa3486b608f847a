"""Tracker: one run's MLflow life as the driver leads it, opened on a thread while Ray starts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.experiment import Experiment, abandoned, amend_identity
from orchestrator.provenance import describe_environment
from orchestrator.redaction import redact
from search_spaces.precisions import precision_of
from trainers.record import last_row

if TYPE_CHECKING:
    from orchestrator.feeder import Delivered, Feeder
    from orchestrator.tracking import EndState, Store, TrackedRun

END_STATES: dict[str, EndState] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
DELIVERED = "logs/delivered.json"
CLOSE_S = 20.0  # patience with a store that is away when the run has ended


class OpeningStore:
    """The store of a runs folder, opened on a thread of its own."""

    def __init__(self, runs_dir: Path):
        self._store: Store | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._open, args=(runs_dir,), name="open-mlflow", daemon=True)
        self._thread.start()

    def get(self) -> Store:
        """Wait for it; raises UserError when the store cannot be used."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._store is not None
        return self._store

    def _open(self, runs_dir: Path) -> None:
        try:
            from orchestrator.tracking import open_store

            self._store = open_store(runs_dir)
        except BaseException as error:  # raised again in `get`, on the driver's thread
            self._error = error


@dataclass(frozen=True)
class Nested:
    """Where a trial's run belongs: below its sweep's."""

    parent_run_id: str
    tags: dict[str, str]
    """with those of the environment, which is its sweep's"""
    is_new: bool
    """nobody has begun it before"""


class Tracker:
    """The run in MLflow, its phases' runs, and the feeder that sends the record on."""

    def __init__(
        self, experiment: Experiment, opening: OpeningStore, say: Callable[[str], None], nested: Nested | None = None
    ):
        self.experiment = experiment
        self._say = say
        self._opening = opening
        self._nested = nested
        self._store: Store | None = None
        self._run: TrackedRun | None = None
        self._phases: dict[str, TrackedRun] = {}
        self._feeder: Feeder | None = None
        self._last: list[dict[str, Any]] = []

    def open(self) -> None:
        """Attach to this run's MLflow run or begin it; raises UserError when the store cannot be used."""
        self._store = self._opening.get()
        from orchestrator.feeder import Feeder

        experiment, identity = self.experiment, self.experiment.identity
        nested = self._nested
        tags = {
            **(nested.tags if nested else describe_environment()),
            "preset": experiment.config.preset,
            "precision": precision_of(experiment.config),
            "fingerprint": experiment.fingerprint,
            "tokenizer.fingerprint": identity["tokenizer"],
            "run_path": str(experiment.run_dir),
        }
        params = {
            **experiment.config.model_dump(mode="json"),
            "corpus": identity["data"],
            "fingerprint": experiment.fingerprint,
        }
        params_later = nested is not None and nested.is_new
        system = experiment.config.preset.split("/")[0]
        self._run = self._store.open_run(
            system,
            experiment.name,
            run_id=identity.get("mlflow_run_id"),
            tags=tags,
            params={} if params_later else params,
            parent_run_id=nested.parent_run_id if nested else None,
            is_new=nested is not None and nested.is_new,
        )
        self._open_phases(system, identity.get("mlflow_phase_run_ids", {}))
        phase_ids = {name: run.run_id for name, run in self._phases.items()}
        amend_identity(
            experiment,
            tracking_uri=redact(self._store.uri),
            mlflow_run_id=self._run.run_id,
            mlflow_phase_run_ids=phase_ids,
            mlflow_ended=False,
        )
        self._feeder = Feeder(
            experiment.run_dir / "metrics.jsonl",
            [spec.name for spec in experiment.config.resolved_phases()],
            self._run,
            self._phases,
            experiment.run_dir / DELIVERED,
            say=self._say,
            of_a_trial=nested is not None,
            params=params if params_later else None,
        )
        self._feeder.start()

    def _open_phases(self, system: str, known: dict[str, str]) -> None:
        """A nested run for each phase of several; a run of one phase has none. `known`: phase -> run id from before."""
        assert self._store is not None and self._run is not None
        experiment = self.experiment
        specs = experiment.config.resolved_phases()
        for spec in specs if len(specs) > 1 else ():
            self._phases[spec.name] = self._store.open_run(
                system,
                f"{experiment.name}/{spec.name}",
                run_id=known.get(spec.name),
                tags={
                    "preset": experiment.config.preset,
                    "phase": spec.name,
                    "fingerprint": experiment.fingerprint,
                },
                params=spec.model_dump(mode="json", exclude={"index"}),
                parent_run_id=self._run.run_id,
            )

    def log_last(self, metrics: dict[str, float]) -> None:
        """Figures about the whole run, to be sent at its last step when it ends: no run is told to have ended before
        it has them."""
        row = last_row(self.experiment.run_dir / "metrics.jsonl") or {}
        self._last = [{"step": row.get("step", 0), "time_ms": row.get("time_ms", 0), **metrics}]

    def close(self, outcome: dict[str, Any]) -> Delivered | None:
        """Send what is left with the plots, samples and links, and end the run truthfully; never raises for a store
        that is away: what could not be sent stays in the record, and the same command sends it later."""
        from orchestrator.tracking import TrackingRefused, TrackingUnavailable

        if self._run is None or self._feeder is None:
            return None
        delivered = self._feeder.close(CLOSE_S)
        with contextlib.suppress(TrackingUnavailable, TrackingRefused):
            self._run.log_metrics(self._last)
            self._send_files(self._run)
            reason = outcome.get("stop_reason") or ("error" if outcome["state"] == "failed" else outcome["reason"])
            self._end_phases(outcome["state"], reason)
            self._run.finish(END_STATES[outcome["state"]], reason)
            amend_identity(self.experiment, mlflow_ended=True)
        return delivered

    def end_abandoned(self) -> None:
        """Runs that --fresh passed over and whose drivers were killed do not stay RUNNING; a store that is away does
        without."""
        from orchestrator.tracking import TrackingRefused, TrackingUnavailable, close_orphan

        for run_dir in self.experiment.passed_over:
            run_id = abandoned(run_dir)
            if run_id is not None and self._store is not None:
                with contextlib.suppress(TrackingUnavailable, TrackingRefused):
                    close_orphan(self._store, run_id, "abandoned")

    def _end_phases(self, state: str, reason: str) -> None:
        """Each phase as it ended: those before the one the run stands in are done, those behind it have not begun."""
        names = list(self._phases)
        row = last_row(self.experiment.run_dir / "metrics.jsonl") or {}
        reached = names.index(row["phase"]) if row.get("phase") in names else 0
        for index, run in enumerate(self._phases.values()):
            if state == "finished" or index < reached:
                run.finish("FINISHED", "completed")
            elif index == reached:
                run.finish(END_STATES[state], reason)
            else:
                run.put_off()

    def _send_files(self, run: TrackedRun) -> None:
        folder = self.experiment.run_dir
        for name, target in (("config.yaml", None), ("plots", "plots"), ("samples", "samples")):
            if (folder / name).exists():
                run.log_artifact(folder / name, target)
        for pointer in ("latest", "best"):
            path = folder / "checkpoints" / pointer
            if path.is_file():
                run.log_link(pointer, folder / "checkpoints" / path.read_text(encoding="utf-8").strip())


def owes(experiment: Experiment) -> bool:
    """Whether a run that has ended still has something to tell MLflow."""
    from orchestrator.feeder import count_rows, read_position

    identity, metrics = experiment.identity, experiment.run_dir / "metrics.jsonl"
    position = read_position(experiment.run_dir / DELIVERED, metrics, identity.get("mlflow_run_id", ""))
    return not identity.get("mlflow_ended") or count_rows(metrics, position.offset) > 0
