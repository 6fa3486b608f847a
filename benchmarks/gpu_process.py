"""A process that is asked one question and answers in lines; it ends with whoever asked, or when its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu_check import without_paths

ROOT = Path(__file__).parents[1]


class OutOfTime(Exception):
    """It was ended by the clock."""


class Died(Exception):
    """It ended otherwise than by itself; the message has its last words."""


def answers(module: str, question: str, seconds: float, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """The lines that `python -m MODULE` answers to `question`, one line on its standard input, which stays open.

    Raises OutOfTime where it took longer, and Died where it failed; what came before was yielded.
    """
    if seconds <= 0:
        raise OutOfTime
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # what it starts itself (compilers, ranks) is ended with it
            env=os.environ | {"PYTHONPATH": _packages()} | dict(environment or {}),
        )
        over = threading.Event()

        def time_is_up() -> None:
            over.set()
            _end(child)

        clock = threading.Timer(seconds, time_is_up)
        clock.start()
        try:
            assert child.stdin is not None and child.stdout is not None
            with suppress(BrokenPipeError):  # why will be found in its last words
                child.stdin.write(question + "\n")
                child.stdin.flush()
            yield from (line for line in child.stdout if line.strip())
            child.wait()
        finally:
            clock.cancel()
            _end(child)
            _close(child)
        if over.is_set():
            raise OutOfTime
        if child.returncode != 0:
            errors.seek(0)
            words = errors.read().strip().splitlines() or [""]
            raise Died(without_paths(f"exit code {child.returncode}: {words[-1][:300]}"))


def _packages() -> str:
    """Ours are found wherever we were started."""
    return os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)


def _end(child: subprocess.Popen[str]) -> None:
    """It and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _close(child: subprocess.Popen[str]) -> None:
    for pipe in (child.stdin, child.stdout):
        with suppress(BrokenPipeError):  # of a question that nobody read
            if pipe is not None:
                pipe.close()
