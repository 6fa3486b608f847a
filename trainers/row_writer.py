"""RowWriter: rows that the training hands over reach their file a moment later, in order, whole, by another thread.

With the caches that a step leaves cold, encoding a row, taking the run's lock, reading the claim and writing cost some
150 microseconds, and milliseconds where the disk is busy. So the training's thread only puts the row on a queue.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.claim import Guard

Row = dict[str, Any]

CADENCE_S = 0.1  # rows wait this long for company; readers, who follow the file, do not see the difference
BLOCK = 1 << 20  # bytes read at a time

ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


class RowWriter:
    """The appending end of a file of rows, one JSON object a line, in the order of `put`.

    A row is in the file CADENCE_S after `put` and durable after `sync`; a process that is killed loses the rows of its
    last moment. Each write happens inside `guard.held()`. A disk that refuses (it is full) delays rows and is warned
    of; no row is lost while the process lives. Any other trouble, Superseded first of all, ends the writing for good
    and is raised by every call that follows.
    """

    def __init__(self, path: Path, guard: Guard, warn: Callable[[str], object]) -> None:
        """Open `path` and drop a torn last line. Raises Superseded when the run is another's."""
        self._path = path
        self._guard = guard
        self._warn = warn
        self._rows: deque[Row] = deque()  # put at one end, taken at the other: both are atomic
        self._unwritten = b""  # lines that the disk refused; they go before the next one
        self._refusal: OSError | None = None
        self._failure: BaseException | None = None
        self._turn = threading.Lock()  # whoever holds it takes rows and writes them
        self._closing = threading.Event()
        with guard.held():
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            self._size = _drop_torn_tail(self._descriptor)
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        """Let `row`, which nobody changes any more, be written soon. Waits for nothing."""
        self._raise_failure()
        self._rows.append(row)

    def sync(self) -> None:
        """Make every row put before durable. Raises OSError where the disk does not take them yet."""
        with self._turn:
            self._write_out()
            self._raise_failure()
            if self._refusal is not None:
                raise self._refusal
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Write what has come and let go of the file. A second call does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        with self._turn:
            self._write_out()
            os.close(self._descriptor)
        self._raise_failure()
        if self._unwritten:
            self._warn(f"{self._path}: the last {self._unwritten.count(10)} rows could not be written and are lost")

    def _run(self) -> None:
        while self._failure is None and not self._closing.wait(CADENCE_S):
            with self._turn:
                self._write_out()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # ---- the file, for whoever has the turn -------------------------------------------------------------

    def _write_out(self) -> None:
        """Write every row that has come, as far as the disk takes them; what else goes wrong is kept in `_failure`."""
        if self._failure is not None or not (self._rows or self._unwritten):
            return
        try:
            lines = [self._unwritten]
            while self._rows:
                lines.append(_line(self._rows.popleft()))
            self._unwritten = b"".join(lines)
            with self._guard.held():
                self._append()
        except BaseException as error:  # carried to the training's thread, which raises it
            self._failure = error

    def _append(self) -> None:
        data = self._unwritten
        try:
            written = os.write(self._descriptor, data)
        except OSError as error:
            self._refused(error)
            return
        whole = written if written == len(data) else data.rfind(b"\n", 0, written) + 1
        if whole < written:
            os.ftruncate(self._descriptor, self._size + whole)  # half a line must not meet the next one
        self._size += whole
        self._unwritten = data[whole:]
        if self._unwritten:
            self._refused(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path)))
        else:
            self._refusal = None

    def _refused(self, error: OSError) -> None:
        if self._refusal is None:
            self._warn(f"{self._path} cannot be written ({error.strerror or error}); rows wait in memory until it can")
        self._refusal = error


def _drop_torn_tail(descriptor: int) -> int:
    """Truncate after the last newline; the size that remains."""
    size = end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - BLOCK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
    return end


def _line(row: Row) -> bytes:
    strict = {
        name: _text(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return ENCODER.encode(strict).encode() + b"\n"


def _text(value: float) -> str:
    """JSON has no numbers for these."""
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
