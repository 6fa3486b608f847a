"""Trainings that take turns on one machine: while one runs, the others stand still with all their processes.

What the machine does to a step within minutes then falls on every side alike. A pair of whole processes, one after the
other, cannot see a difference of 3% where the same bare step wanders by 25% between them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil

SETTLING_ROWS = 10  # of every side before the first turn: imports, allocators and Ray's start are not a step's cost
PATIENCE_S = 180.0  # for a side's first rows
ENDING_S = 10.0  # for what was killed to be gone


@dataclass(frozen=True)
class Row:
    """A logged step."""

    step: int
    time_ms: float
    """Unix time at its end"""
    loss: float


@dataclass(frozen=True)
class Turn:
    """One side's part of a round."""

    intervals: list[float]
    """milliseconds per step between two logged steps that both lie in this turn"""
    cpu_seconds: float
    """of all its processes"""
    seconds: float

    @property
    def step_ms(self) -> float:
        return float(np.mean(self.intervals))

    @property
    def median_ms(self) -> float:
        """A hiccup does not show."""
        return float(np.median(self.intervals))

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds per step, at this turn's pace."""
        return self.cpu_seconds / self.seconds * self.step_ms


@dataclass
class Training:
    """A command that trains, and where its logged steps can be read while it does."""

    command: list[str]
    rows: Callable[[], Sequence[Row]]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Run until SETTLING_ROWS are logged, then stand still.

        Raises:
            RuntimeError: it ended, or logged too little in PATIENCE_S.
        """
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + PATIENCE_S
        while len(self.rows()) < SETTLING_ROWS:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {SETTLING_ROWS} logged steps in {PATIENCE_S:.0f} s: {self.log.read_text()}")
            self._wait(0.5)
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> Turn:
        """Run for `seconds`, then stand still."""
        cpu = self._cpu_seconds()
        start = time.time_ns() / 1e6
        self._signal(signal.SIGCONT)
        self._wait(seconds)
        self._signal(signal.SIGSTOP)
        end = time.time_ns() / 1e6
        inside = [row for row in self.rows() if start <= row.time_ms <= end]
        pairs = pairwise(inside)
        intervals = [(b.time_ms - a.time_ms) / (b.step - a.step) for a, b in pairs]
        if not intervals:
            raise RuntimeError(f"a turn of {seconds:g} s is shorter than two logged steps")
        return Turn(intervals, self._cpu_seconds() - cpu, (end - start) / 1e3)

    def close(self) -> None:
        """End it with all its processes."""
        processes = self._tree()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process is not None:
            self.process.wait()
        psutil.wait_procs(processes, ENDING_S)

    def _wait(self, seconds: float) -> None:
        assert self.process is not None
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(seconds)
            raise RuntimeError(f"ended with {code}: {self.log.read_text()}")

    def _signal(self, number: signal.Signals) -> None:
        """To parents before children, so that nobody looks after a child that stands still."""
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        if self.process is None:
            return []
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def _cpu_seconds(self) -> float:
        total = 0.0
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


@contextmanager
def started(trainings: Mapping[str, Training]) -> Iterator[None]:
    """All of them settled and standing still; ended afterwards, also when this process is asked to end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for training in trainings.values():
            training.start()
        yield
    finally:
        for training in trainings.values():
            training.close()
        signal.signal(signal.SIGTERM, before)
