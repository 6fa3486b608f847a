"""The terminal: consoles that leave without a word when their reader does."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table

WIDEST = 1000
"""columns that a table may take"""


class QuietConsole(Console):
    """A console whose broken pipe is BrokenPipeError (rich would end the process with code 1), and which cuts no number
    of a table: what a line has no room for goes beyond it."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does; tables are as wide as their columns that do not wrap."""
        parts = [part for each in objects for part in (each.renderables if isinstance(each, Group) else [each])]
        least = max((self._least_width(part) for part in parts if isinstance(part, Table)), default=0)
        there = self.width
        if least <= there:
            super().print(*objects, **options)
            return
        self.width = least
        try:
            super().print(*objects, **{"crop": False, **options})
        finally:
            self.width = there

    def _least_width(self, table: Table) -> int:
        """What a table needs to cut no cell: of those that may wrap a word, of those that may fold a letter."""
        _, right, _, left = table.padding
        anywhere = self.options.update(max_width=WIDEST)
        least = 0
        for column in table.columns:
            least += right + left
            if column.overflow == "fold":
                least += 1
                continue
            sizes = [Measurement.get(self, anywhere, cell) for cell in (column.header, *column.cells)]
            least += max(size.maximum if column.no_wrap else size.minimum for size in sizes)
        return least

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError


def out() -> QuietConsole:
    """Results go here."""
    return QuietConsole(highlight=False)


def err() -> QuietConsole:
    """Errors and, under --json, progress go here."""
    return QuietConsole(stderr=True, highlight=False)


def open_streams() -> None:
    """Give a standard stream that was closed (`>&-`) to nowhere, and let none fail on a letter it cannot write.

    Else the next file opened, the database say, would get the free number, and whatever is printed would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def silence(stream_number: int) -> None:
    """Send a standard stream whose reader is gone to nowhere, so that closing it at exit raises nothing."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream_number)
    os.close(nowhere)


def print_json(value: object) -> None:
    """One JSON document on standard output; NaN and infinity become null, which every reader can read."""
    import json

    try:
        sys.stdout.write(json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # what was done stays done, and the exit code says how it ended
        silence(1)


def finite(value: object) -> object:
    """`value` with every number JSON cannot say replaced by None."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def pairs(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    """Names left, values right of them; a value too long for the line is folded under itself."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def count(number: float) -> str:
    """1234567 -> '1,234,567'."""
    return f"{number:,.0f}"


def short(number: float) -> str:
    """A number in four characters or so: 950, 45.1k, 3.2M."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.3g}T"


def size(n_bytes: float) -> str:
    """Bytes in binary units: '4.7 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """'45 s', '3:07 min', '2:05 h', '3 days'."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} days"
