"""Carries the record of a run to MLflow, from the driver, behind training's back.

`metrics.jsonl` is the outbox. A row is sent with the step and the time it was first written with, so sending it again
changes nothing; only the place up to which everything arrived has to be remembered, and even that may be forgotten.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator.absence import Absence
from orchestrator.system_metrics import SystemMeter, system_interval_s
from orchestrator.tracking import TrackedRun, TrackingRefused, TrackingUnavailable
from trainers.record import read_rows

Row = dict[str, Any]

POLL_S = 2.0
CLOSING_RETRY_S = 0.25
CHUNK_ROWS = 250  # some two thousand values: a chunk that is lost to a locked store costs little
SYSTEM_SAMPLES_KEPT = 1000  # nearly three hours at one in ten seconds


@dataclass(frozen=True)
class Delivered:
    """What `Feeder.close` leaves behind."""

    rows: int
    """rows of the record that this feeder brought to the store"""
    pending: int
    """rows that still wait in the record; the next attempt sends them"""
    problem: str | None
    """why they wait"""


@dataclass
class Position:
    """How far into the record everything has arrived."""

    run_id: str
    offset: int = 0
    """bytes"""
    step: int = -1
    """highest step sent: `tokens` stands in every row of a step but is sent once"""


class Feeder:
    """Sends rows every two seconds from its own thread; it never raises into training and never makes it wait.

    The parent run gets every row; with several phases each phase's run gets its own. While the store is away rows wait
    in the record, and `say` hears of it once, and once more when all has caught up.
    """

    def __init__(
        self,
        metrics_path: Path,
        phases: Sequence[str],
        run: TrackedRun,
        phase_runs: Mapping[str, TrackedRun],
        state_path: Path,
        *,
        say: Callable[[str], None] = logging.getLogger(__name__).warning,
        system_every_s: float | None = None,
        of_a_trial: bool = False,
        params: Mapping[str, Any] | None = None,
    ):
        """`of_a_trial`: its scores stand besides by tokens, so that batch sizes compare, and the machine's figures are
        left out (they are those of all trials together). `params`: sent before the first row."""
        self._metrics_path = metrics_path
        self._phases = list(phases)
        self._run = run
        self._phase_runs = dict(phase_runs)
        self._state_path = state_path
        self._say = say
        self._position = read_position(state_path, metrics_path, run.run_id)

        self._params = params
        self._by_tokens = of_a_trial
        self._system_every_s = None if of_a_trial else system_every_s or system_interval_s()
        self._system: deque[Row] = deque(maxlen=SYSTEM_SAMPLES_KEPT)
        self._system_step = run.next_system_step

        self._rows = 0
        self._refusal: str | None = None
        self._absence = Absence(
            say,
            away="MLflow is away ({problem}): training goes on, its rows wait in metrics.jsonl.",
            back="MLflow is back and has every row.",
        )
        self._closing_by: float | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-feeder", daemon=True)

    # ---- for the driver -------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def close(self, deadline_s: float) -> Delivered:
        """Send what is left, for at most so long, and stop."""
        self._closing_by = time.monotonic() + deadline_s
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(deadline_s)
        pending = count_rows(self._metrics_path, self._position.offset)
        late = f"{deadline_s:g} s were not enough" if pending else None
        return Delivered(self._rows, pending, self._refusal or self._absence.problem or late)

    # ---- the thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        meter = SystemMeter() if self._system_every_s else None
        next_sample = time.monotonic() + 1.0  # the first after a second: even a short run has one
        while True:
            now = time.monotonic()
            if meter and now >= next_sample:
                self._system.append(meter.sample(self._system_step))
                self._system_step += 1
                next_sample = now + (self._system_every_s or 0)
            closing_by = self._closing_by
            if closing_by is not None or self._absence.is_due:
                idle = self._deliver()
                if closing_by is not None and (idle or self._out_of_time()):
                    return
            waits = CLOSING_RETRY_S if closing_by is not None else POLL_S
            self._wake.wait(waits)
            self._wake.clear()

    def _deliver(self) -> bool:
        """Send everything there is; True where nothing is left that could be sent."""
        if self._refusal is not None:
            return True
        try:
            self._send_params()
            self._send_rows()
            self._send_system()
        except (TrackingUnavailable, OSError) as error:  # OSError: no room for the position; nothing is lost by it
            self._absence.note(str(error))
            return False
        except TrackingRefused as error:
            self._refusal = str(error)
            self._say(f"MLflow refuses this run ({error}): nothing more is sent; metrics.jsonl keeps every row.")
            return True
        if self._out_of_time():
            return False
        self._absence.end()
        return True

    def _send_params(self) -> None:
        if self._params is not None:
            self._run.log_params(self._params)
            self._params = None

    def _send_rows(self) -> None:
        """Send the record to its present end, or until the time to close has run out, some rows at a time."""
        waiting = read_rows(self._metrics_path, offset=self._position.offset)
        while not self._out_of_time() and (chunk := list(islice(waiting, CHUNK_ROWS))):
            scores = by_tokens(row for row, _ in chunk) if self._by_tokens else []
            rows = self._once([row for row, _ in chunk])
            self._run.log_metrics([*rows, *scores])
            for name, run in self._phase_runs.items():
                run.log_metrics([row for row in rows if self._phase_of(row) == name])
            highest = max(self._position.step, *(row["step"] for row in rows))
            self._position = Position(self._run.run_id, offset=chunk[-1][1], step=highest)
            write_position(self._state_path, self._position)
            self._rows += len(rows)

    def _out_of_time(self) -> bool:
        return self._closing_by is not None and time.monotonic() >= self._closing_by

    def _once(self, rows: list[Row]) -> list[Row]:
        """The rows with `tokens` in the first one of each step only: the next has another time, so it would count."""
        highest = self._position.step
        for row in rows:
            if row["step"] <= highest:
                row.pop("tokens", None)
            highest = max(highest, row["step"])
        return rows

    def _phase_of(self, row: Row) -> str | None:
        phase = row.get("phase")
        return self._phases[phase] if isinstance(phase, int) else phase

    def _send_system(self) -> None:
        samples = list(self._system)
        if samples:
            self._run.log_metrics(samples)
            self._system.clear()  # only this thread appends


def by_tokens(rows: Iterable[Row]) -> list[Row]:
    """The scores among the rows once more as `by_tokens/NAME`, with the tokens trained on for a step."""
    return [
        {"step": row["tokens"], "time_ms": row["time_ms"], **{f"by_tokens/{name}": row[name] for name in scores}}
        for row in rows
        if (scores := [name for name in row if name.startswith("val/")])
    ]


# ---- how far the record has been sent ---------------------------------------------------------------------------


def count_rows(metrics_path: Path, offset: int) -> int:
    """Rows behind byte `offset`."""
    return sum(1 for _ in read_rows(metrics_path, offset=offset))


def read_position(state_path: Path, metrics_path: Path, run_id: str) -> Position:
    """Where to go on for `run_id`; the beginning where that is not known, or the record is another one."""
    try:
        position = Position(**json.loads(state_path.read_text(encoding="utf-8")))
        with metrics_path.open("rb") as record:
            record.seek(max(0, position.offset - 1))
            at_line_end = position.offset == 0 or record.read(1) == b"\n"
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return Position(run_id)
    return position if position.run_id == run_id and at_line_end else Position(run_id)


def write_position(state_path: Path, position: Position) -> None:
    temporary = state_path.with_name(state_path.name + ".tmp")
    temporary.write_text(json.dumps(asdict(position)) + "\n", encoding="utf-8")
    os.replace(temporary, state_path)
