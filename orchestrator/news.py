"""News: what the workers of a run have written since the last look."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from trainers.context import NOTES, read_notes
from trainers.record import read_rows

METRICS = "metrics.jsonl"

T = TypeVar("T")


class News:
    """Rows of metrics.jsonl and notes of logs/events.jsonl, each once."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._offsets = {METRICS: 0, NOTES: 0}

    def skip(self) -> None:
        """What stands there now is no news."""
        for name in self._offsets:
            path = self.run_dir / name
            self._offsets[name] = path.stat().st_size if path.exists() else 0

    def rows(self) -> Iterator[dict[str, Any]]:
        return self._new(METRICS, read_rows(self.run_dir / METRICS, offset=self._offsets[METRICS]))

    def notes(self) -> Iterator[str]:
        return self._new(NOTES, read_notes(self.run_dir, self._offsets[NOTES]))

    def _new(self, name: str, items: Iterator[tuple[T, int]]) -> Iterator[T]:
        """What has come into a file since the last look; `items` is not begun where nothing has."""
        path = self.run_dir / name
        if path.exists() and path.stat().st_size > self._offsets[name]:
            for item, end in items:
                self._offsets[name] = end
                yield item
