"""Journal: RUNS/SWEEP/sweep.jsonl, the file of a sweep's history, one event a line, never rewritten."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.sweeps.history import Ending, Exploit, History, Params, Seen, StopReason, Trial
from trainers.claim import Guard
from trainers.filesystem import Filesystem, write_all

JOURNAL = "sweep.jsonl"


class Journal:
    """The history and its writing end; every line is written under the claim's guard and durable before we go on.

    Raises Superseded where a newer claim owns the sweep.
    """

    def __init__(self, path: Path, guard: Guard):
        self.folder = path.parent
        """the sweep's"""
        self._guard = guard
        self.history = History()
        with guard.held():
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            size = 0
            for event, end in _events(path):
                replay(self.history, event)
                size = end
            os.ftruncate(self._descriptor, size)  # a line that a kill tore

    def ask(self, params: Params) -> Trial:
        """A new trial, numbered on."""
        number = len(self.history.trials)
        self._write({"event": "asked", "trial": number, "params": params})
        return self.history.ask(number, params)

    def see(self, number: int, seen: Seen, judge: Callable[[], StopReason | None] = lambda: None) -> bool:
        """Note an evaluation with what `judge` makes of it, once it stands in the history, in one line: no kill comes
        between the two. False where it was noted before (replayed after a kill), which changes nothing."""
        new = self.history.see(number, seen)
        if new:
            trial = self.history.trials[number]
            trial.stop = judge()
            self._write({"event": "seen", "trial": number, **asdict(seen), "stop": trial.stop})
        return new

    def end(self, number: int, ending: Ending) -> None:
        """Note that a trial is over for good."""
        self._write({"event": "ended", "trial": number, **asdict(ending)})
        self.history.end(number, ending)

    def exploit(self, finished_round: int, exploits: list[Exploit]) -> None:
        """Note who takes over from whom after a round, all or nothing."""
        first = exploits[0].trial if exploits else 0
        self._write(
            {"event": "round", "trial": first, "round": finished_round, "exploits": [asdict(each) for each in exploits]}
        )
        self.history.rounds = finished_round
        for each in exploits:
            self.history.exploit(each)

    def rest(self, number: int, train_s: float) -> None:
        """Note that a trial was interrupted, or rests between two rounds, after so many seconds of training."""
        self._write({"event": "rested", "trial": number, "train_s": train_s})
        self.history.trials[number].train_s += train_s

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, event: dict[str, Any]) -> None:
        line = json.dumps({**event, "time_ms": time.time_ns() // 1_000_000}, separators=(",", ":")) + "\n"
        with self._guard.held():
            end = os.fstat(self._descriptor).st_size
            try:
                write_all(Filesystem(), self._descriptor, line.encode())
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, end)  # a full disk took half a line; the next must not be glued to it
                raise


def read_history(path: Path) -> History:
    """The history of a sweep, for those who only look."""
    history = History()
    for event, _ in _events(path):
        replay(history, event)
    return history


def replay(history: History, event: dict[str, Any]) -> None:
    """Take a line of the journal into the history."""
    number = event["trial"]
    if event["event"] == "asked":
        history.ask(number, event["params"])
    elif event["event"] == "seen":
        history.see(number, Seen(event["tokens"], tuple(event["values"]), event["spread"]))
        history.trials[number].stop = event["stop"]
    elif event["event"] == "round":
        history.rounds = event["round"]
        for each in event["exploits"]:
            history.exploit(Exploit(**each))
    elif event["event"] == "rested":
        history.trials[number].train_s += event["train_s"]
    elif event["event"] == "ended":
        history.end(
            number,
            Ending(event["reason"], tuple(event["values"]), event["tokens"], event["train_s"], event["message"]),
        )


def _events(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Each whole line with the byte where it ends."""
    events, end = [], 0
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            events.append((json.loads(line), end))
    return events
