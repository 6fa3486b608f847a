"""MetricsRecord: metrics.jsonl, one flat object a line, each (step, metric) in it once.

The file is the record of a run and the outbox from which the driver feeds the tracker. The first write wins: after
a restart the steps since the checkpoint are trained again, and their values are compared, bit for bit, with what
stands in the record, and not written again. A value that differs means that the run did not go on exactly; it is
counted as `resume/diverged`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

from trainers.claim import Guard
from trainers.row_writer import BLOCK, Row, RowWriter

Value = float | int | str

HEAD = ("step", "tokens", "time_ms", "phase")
DIVERGED = "resume/diverged"
UNCOMPARED = ("perf/", "mem/", "system/", "resume/")  # what the machine did, not what the model did
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no numbers for these

REMEMBERED_STEPS = 64  # a metric may come this many logged steps late and still be known as written or not
REMEMBERED_INCIDENTS = 1000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Incident:
    """One replayed value that is not what was recorded."""

    step: int
    name: str
    was: Value
    now: Value


class MetricsRecord:
    """The writing end, on rank 0."""

    def __init__(
        self, path: Path, guard: Guard, *, resume_step: int, warn: Callable[[str], object] = log.warning
    ) -> None:
        """Open `path`, drop a torn last line, and remember what stands there from `resume_step` on.

        Raises Superseded when the run is another's.
        """
        self.incidents: list[Incident] = []
        self.diverged = 0
        self._path = path
        self._warn = warn
        self._writer = RowWriter(path, guard, warn)
        self._known = self._replay_window(resume_step)
        """step -> name -> value as written"""
        self._last_known = max(self._known, default=resume_step)

    def append(
        self, step: int, tokens: int, phase: str, metrics: Mapping[str, SupportsFloat], time_ms: int | None = None
    ) -> int:
        """Record what is new at `step`; how many values differ from those recorded before.

        Waits for no disk: the row is in the file a tenth of a second later (see RowWriter, also for a full disk).
        Raises what kept earlier rows from being written: Superseded when the run is another's.
        """
        given: dict[str, Value] = {name: _plain(value) for name, value in metrics.items()}
        assert given.keys().isdisjoint(HEAD), "a metric bears the name of a column"
        known = self._known.get(step)
        differing: list[Incident] = []
        if known is not None:
            differing = _differences(step, known, {"tokens": tokens, "phase": phase, **given})
            given = {name: value for name, value in given.items() if name not in known}
            if differing:
                self._remember(differing)
                if DIVERGED not in known:
                    given[DIVERGED] = len(differing)
        if given:
            when = time.time_ns() // 1_000_000 if time_ms is None else time_ms
            self._writer.put({"step": step, "tokens": tokens, "time_ms": when, "phase": phase, **given})
            self._know(step, {"tokens": tokens, "phase": phase, **given})
        return len(differing)

    def sync(self) -> None:
        """Make every row durable. Called where a checkpoint is about to make them impossible to replay.

        May be called from any thread. Raises OSError where the disk does not take them, and as `append`.
        """
        self._writer.sync()

    def close(self) -> None:
        """Write what has come and let go of the file, after one more try with rows that a full disk refused.

        Raises as `append`.
        """
        self._writer.close()

    # ---- what is known ------------------------------------------------------------------------------

    def _replay_window(self, resume_step: int) -> dict[int, dict[str, Value]]:
        known: dict[int, dict[str, Value]] = {}
        for line, end in _lines(self._path, 0):
            step = _step_of(line)
            if step is None:
                self._warn(f"{self._path.name}: the line that ends at byte {end} is not a row; it is passed over")
            elif step >= resume_step and (row := _parse(line)):
                values = known.setdefault(step, {})
                for name, value in row.items():
                    if name not in ("step", "time_ms"):
                        values.setdefault(name, value)
        return known

    def _know(self, step: int, values: dict[str, Value]) -> None:
        known = self._known.setdefault(step, {})
        for name, value in values.items():
            known.setdefault(name, value)
        if step > self._last_known:
            self._last_known = step
            while len(self._known) > REMEMBERED_STEPS:  # in the order they came: oldest first
                del self._known[next(iter(self._known))]

    def _remember(self, incidents: list[Incident]) -> None:
        self.diverged += len(incidents)
        self.incidents += incidents[: REMEMBERED_INCIDENTS - len(self.incidents)]


# ---- the reading end -----------------------------------------------------------------------------------


def read_rows(path: Path, *, offset: int = 0) -> Iterator[tuple[Row, int]]:
    """Each row after byte `offset` with the byte where it ends, which is where to go on later.

    Stops before a last line without its newline. A whole line that is no row is passed over (opening the record for
    writing warns of it). Non-finite values are floats again. No file: no rows.
    """
    for line, end in _lines(path, offset):
        row = _parse(line)
        if row is not None:
            yield row, end


def last_row(path: Path) -> Row | None:
    """The newest step's values, its rows joined; None for an empty record. Reads the end of the file only."""
    size = path.stat().st_size if path.exists() else 0
    span = 1 << 16
    while size:
        rows = [row for row, _ in read_rows(path, offset=max(0, size - span))]
        newest = max((row["step"] for row in rows), default=None)
        # A step's rows may begin before the span: look further unless an older step came first.
        if newest is not None and (span >= size or rows[0]["step"] < newest):
            return _joined(row for row in rows if row["step"] == newest)
        if span >= size:
            return None
        span *= 4
    return None


def series(path: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, in the order of steps."""
    return sorted((row["step"], row[name]) for row, _ in read_rows(path) if name in row)


def _joined(rows: Iterator[Row]) -> Row:
    joined: Row = {}
    for row in rows:
        joined = row | joined
    return joined


def _lines(path: Path, offset: int) -> Iterator[tuple[bytes, int]]:
    """Each complete line after `offset` without its newline, and the byte after that newline."""
    try:
        handle = path.open("rb")
    except FileNotFoundError:
        return
    with handle:
        handle.seek(offset)
        rest = b""
        while block := handle.read(BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                yield line, offset


def _step_of(line: bytes) -> int | None:
    """The step of a row without parsing all of it: a record of a million rows is read at every restart."""
    if line.startswith(b'{"step":') and line.endswith(b"}"):
        digits = line[8 : line.find(b",")]
        if digits.isdigit():
            return int(digits)
    row = _parse(line)
    return row["step"] if row else None


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is one of the first
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return {name: _number(value) if name not in HEAD else value for name, value in row.items()}


# ---- values --------------------------------------------------------------------------------------------


def _plain(value: SupportsFloat | str) -> Value:
    """A Python number (or text) that JSON writes exactly; NumPy's and torch's scalars become floats."""
    if type(value) in (float, int, str):
        return value  # type: ignore[return-value]
    return int(value) if isinstance(value, (bool, int)) else float(value)


def _number(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _differences(step: int, known: Mapping[str, Value], given: Mapping[str, Value]) -> list[Incident]:
    """The values that stand under the same name and are not the same bits (NaN is NaN; 0.0 is not -0.0)."""
    return [
        Incident(step, name, known[name], now)
        for name, now in given.items()
        if name in known and not name.startswith(UNCOMPARED) and repr(known[name]) != repr(now)
    ]
