"""How long jobs on data tell that they are alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, str], None]
"""progress(done_bytes, total_bytes, what): total is 0 where it is not known"""

INTERVAL_S = 0.25
HEARTBEAT_S = 0.5


def silent(done_bytes: int, total_bytes: int, what: str) -> None:
    """Progress nobody looks at."""


class Throttled:
    """Adds up bytes and reports at most once an INTERVAL_S, so that tiny documents cost nothing."""

    def __init__(self, progress: Progress, total_bytes: int, what: str) -> None:
        self._progress, self._total, self._what = progress, total_bytes, what
        self._done, self._next = 0, 0.0

    def add(self, n_bytes: int) -> None:
        self._done += n_bytes
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + INTERVAL_S
            self._progress(self._done, self._total, self._what)

    def finish(self) -> None:
        self._progress(self._done, self._total or self._done, self._what)


@contextmanager
def heartbeat(progress: Progress, done_bytes: int, total_bytes: int, what: str) -> Iterator[None]:
    """Reports every HEARTBEAT_S from a thread while a library call that cannot report runs."""
    stop = threading.Event()

    def beat() -> None:
        started = time.monotonic()
        while not stop.wait(HEARTBEAT_S):
            progress(done_bytes, total_bytes, f"{what} ({time.monotonic() - started:.0f} s)")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
