"""Absence: a store that comes and goes: when it is asked again, and what a person hears of that."""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_BACKOFF_S = 30.0


class Absence:
    """Says once that the store is away, and once that it is back; between its attempts lies twice the wait before."""

    def __init__(self, say: Callable[[str], None], *, away: str, back: str):
        """`away`: a sentence with `{problem}` where the reason is to stand."""
        self._say, self._away, self._back = say, away, back
        self._retry_at = self._backoff_s = 0.0
        self.problem: str | None = None
        """why the store is away; None while it is there"""

    @property
    def is_due(self) -> bool:
        """Whether the store is to be asked, for the first time or again."""
        return time.monotonic() >= self._retry_at

    def note(self, problem: str) -> None:
        """It did not answer."""
        if self.problem is None:
            self._say(self._away.format(problem=problem))
        self.problem = problem
        self._backoff_s = min(MAX_BACKOFF_S, max(1.0, 2 * self._backoff_s))
        self._retry_at = time.monotonic() + self._backoff_s

    def end(self) -> None:
        """It answered."""
        if self.problem is not None:
            self._say(self._back)
        self.problem = None
        self._backoff_s = self._retry_at = 0.0
