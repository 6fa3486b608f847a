"""Lock: an flock on a file, which dies with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from pathlib import Path

POLL_S = 0.02

_open_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """An flock on a file of the run. Programs started from here do not inherit it, nor do forked children keep it."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        _open_locks.add(self)

    @property
    def closed(self) -> bool:
        return self._descriptor < 0

    def take(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def take_now(self) -> bool:
        """Whether it was free."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def take_before(self, deadline: float) -> bool:
        while not self.take_now():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        return True

    def let_go(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Gives the lock up too, unless another process shares the descriptor."""
        if not self.closed:
            os.close(self._descriptor)
            self._descriptor = -1

    def is_of_path(self) -> bool:
        """Whether the locked file is still the one that bears the name."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False


def _close_open_locks_in_child() -> None:
    for lock in list(_open_locks):
        lock.close()


os.register_at_fork(after_in_child=_close_open_locks_in_child)
