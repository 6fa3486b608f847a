"""StopSignals: how a person or a machine asks a command to stop."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """The first signal is a wish, told by `reason`; the second ends this process, and what it started with it."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """the first signal's name"""
        self._nothing_to_save = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Signals are heard inside, and have their former meaning after."""
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """While there is nothing to save and nobody to ask, a signal is KeyboardInterrupt."""
        self._nothing_to_save = True
        try:
            yield
        finally:
            self._nothing_to_save = False

    def leave_if_asked(self) -> None:
        """KeyboardInterrupt where a signal has come already."""
        if self.reason:
            raise KeyboardInterrupt(self.reason)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason:
            os._exit(128 + number)
        self.reason = signal.Signals(number).name
        if self._nothing_to_save:
            raise KeyboardInterrupt(self.reason)
