"""ParentRun: the sweep's own run in MLflow, below which its trials lie, from its beginning to its truthful end."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from orchestrator.provenance import describe_environment
from orchestrator.sweeps.history import History, Trial
from orchestrator.sweeps.journal import JOURNAL
from orchestrator.sweeps.refused import enter_refused, untold
from orchestrator.sweeps.sweep import Sweep, write_sweep
from orchestrator.sweeps.training import owes, settle
from orchestrator.sweeps.winner import command_of, lineage_of
from orchestrator.tracker import OpeningStore

if TYPE_CHECKING:
    from orchestrator.tracking import EndState, TrackedRun

ENDED = "parent_ended"
"""in sweep.json: whether MLflow knows how the sweep's last command ended"""


class ParentRun:
    """Made by `open_parent`. Once it is open no store that is away ends the sweep: what it owes MLflow is paid later,
    at the latest by the same command again."""

    def __init__(self, sweep: Sweep, opening: OpeningStore, run: TrackedRun, say: Callable[[str], None]):
        self.sweep, self.run, self.run_id = sweep, run, run.run_id
        self._opening, self._say = opening, say
        self._owes = False

    def settle(self, history: History) -> None:
        """Tell MLflow what it is owed of the trials."""
        with self._noted():
            settle(self.sweep, history, self._opening, self.run_id, self._say)
            for trial in untold(self.sweep, history):
                enter_refused(self.sweep, trial, self._opening, self.run_id)

    def tell(self, history: History, best: Trial | None, seconds: float, train_s: float, tokens: int) -> None:
        """What the whole sweep came to so far. `seconds`: by the clock; `train_s`: inside train(), over all trials."""
        ended = sum(1 for _ in history.ended())
        row = {"step": ended, "time_ms": time.time_ns() // 1_000_000, "sweep/wall_s": seconds,
               "sweep/train_s": train_s, "sweep/tokens": tokens}  # fmt: skip
        if best is not None and best.ending is not None:
            row["sweep/best"] = best.ending.values[0]
        with self._noted():
            self.run.log_metrics([row])
            if best is not None:
                self.run.set_tags(
                    {
                        "sweep.best": best.name,
                        "sweep.command": command_of(self.sweep, best),
                        "sweep.lineage": lineage_of(self.sweep, history, best) if best.lineage else "",
                    }
                )
            self.run.log_artifact(self.sweep.folder / JOURNAL)
            self.run.log_artifact(self.sweep.folder / "config.yaml")

    def finish(self, state: EndState, reason: str) -> None:
        with self._noted():
            self.run.finish(state, reason)
            write_sweep(self.sweep, **{ENDED: True})

    @contextlib.contextmanager
    def ended_truthfully(self) -> Iterator[None]:
        """Whatever ends the driver inside, the sweep's MLflow run does not stay RUNNING."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(Exception):
                self.finish("FAILED", f"error: {type(error).__name__}")
            raise error

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        from orchestrator.tracking import StoreAway, TrackingRefused, TrackingUnavailable

        try:
            yield
        except (StoreAway, TrackingUnavailable, TrackingRefused) as error:
            if not self._owes:
                self._say(
                    f"MLflow was not told all ({error.__cause__ or error}): the same command again tells it the rest"
                )
            self._owes = True


def open_parent(sweep: Sweep, opening: OpeningStore, slots: int, say: Callable[[str], None]) -> ParentRun:
    """The sweep's run, begun or gone on with. `slots`: trials at a time. Raises UserError where the store fails."""
    tags = {
        **describe_environment(),
        "kind": "sweep",
        "preset": sweep.base.preset,
        "fingerprint": sweep.fingerprint,
        "run_path": str(sweep.folder),
        "sweep.settings": sweep.settings.model_dump_json(),
        "sweep.taken_out": json.dumps([list(cell) for cell in sweep.taken_out]),
        "sweep.slots": str(slots),
    }
    run = opening.get().open_run(
        sweep.base.preset.split("/")[0],
        sweep.name,
        run_id=sweep.identity.get("mlflow_run_id"),
        tags=tags,
        params={**sweep.base.model_dump(mode="json"), "corpus": sweep.shared_identity["data"]},
    )
    write_sweep(sweep, mlflow_run_id=run.run_id, **{ENDED: False})
    return ParentRun(sweep, opening, run, say)


def is_told(sweep: Sweep, history: History) -> bool:
    """Whether MLflow has all there is to know of the sweep as it stands."""
    return sweep.identity.get(ENDED, True) and not owes(sweep, history) and not any(untold(sweep, history))
