"""Work on the next item while the caller uses this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import Generic, TypeVar

Item = TypeVar("Item")

JOIN_TIMEOUT_S = 10.0  # a thread may sit in a network read; it is a daemon, so the process can end without it


class Ahead(Generic[Item]):
    """The items of a generator, the next one made in one background thread; at most one ahead.

    The thread starts with the first `take`. An error of the generator is raised by the `take` that would have got the
    item, in the caller's thread.
    """

    def __init__(self, items: Generator[Item, None, None]) -> None:
        self._items = items
        self._wanted = threading.Semaphore(0)
        self._ready: queue.SimpleQueue[Item | BaseException] = queue.SimpleQueue()
        self._closing = False
        self._thread: threading.Thread | None = None

    def take(self) -> Item:
        """The next item; the one after it is begun. The generator must not end."""
        assert not self._closing
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
            self._thread.start()
            self._wanted.release()
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # whoever asks again is told again
            raise item
        self._wanted.release()
        return item

    def close(self) -> None:
        """Ends the thread; an item it is making is lost."""
        self._closing = True
        self._wanted.release()
        if self._thread is not None:
            self._thread.join(JOIN_TIMEOUT_S)

    def _work(self) -> None:
        while True:
            self._wanted.acquire()
            if self._closing:
                self._items.close()  # now: at interpreter exit the libraries below it are half gone
                return
            try:
                item = next(self._items)
            except BaseException as error:  # handed to the thread that waits for the item
                self._ready.put(error)
                return
            self._ready.put(item)
