"""RunContext: where a training runs and how it speaks to whoever started it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from trainers.claim import Claim, Guard

STOP_REQUEST = "stop-request.json"
NOTES = "logs/events.jsonl"
GIVEN_UP = frozenset({"asha", "hyperband", "median"})  # a sweep's reasons to stop a run from which none will go on


class RunContext(Protocol):
    """What `train` may ask of its surroundings."""

    rank: int
    world_size: int
    local_rank: int
    run_dir: Path
    cache_dir: Path
    guard: Guard
    tracking: dict[str, str]
    """where the run is recorded besides (the MLflow run's id), for the checkpoint"""

    def should_stop(self) -> str | None:
        """Why to stop at the next step boundary, as this rank sees it; the loop lets all ranks agree."""
        ...

    def report(self, metrics: dict[str, float]) -> None:
        """Collective: every rank calls it at every evaluation."""
        ...

    def note(self, text: str) -> None:
        """A sentence for the person: a warning, a restart, an incident."""
        ...


class RunFolder:
    """The parts of a context that live in the run's folder, shared by every kind of context."""

    def __init__(self, run_dir: Path, cache_dir: Path, guard: Guard, rank: int, world_size: int, local_rank: int):
        self.run_dir = run_dir
        self.cache_dir = cache_dir
        self.guard = guard
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.tracking: dict[str, str] = {}
        self._stop_path = str(run_dir / STOP_REQUEST)
        self._signalled: str | None = None

    def should_stop(self) -> str | None:
        if self._signalled:
            return self._signalled
        if not os.path.exists(self._stop_path):  # about 2 microseconds: cheap enough for every step
            return None
        return requested_stop(self.run_dir, self.guard.generation)

    def report(self, metrics: dict[str, float]) -> None:
        """Nobody to tell: the record has the metrics."""

    def note(self, text: str) -> None:
        """Append to logs/events.jsonl, which the driver shows (`read_notes`)."""
        line = json.dumps({"time_ms": time.time_ns() // 1_000_000, "rank": self.rank, "text": text}) + "\n"
        log = self.run_dir / NOTES
        log.parent.mkdir(exist_ok=True)
        with log.open("a", encoding="utf-8") as handle:
            handle.write(line)

    def stop_on_signals(self) -> None:
        """SIGTERM, SIGINT and SIGUSR1 ask for a stop at the next step boundary; a second one ends at once."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(128 + number)
        self._signalled = signal.Signals(number).name


class LocalContext(RunFolder):
    """One bare process, or one rank under torchrun: claims the run itself."""

    def __init__(self, run_dir: Path, cache_dir: Path | None = None):
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._claim = Claim.acquire(run_dir) if rank == 0 else None
        guard = self._begin(run_dir, world_size)
        super().__init__(run_dir, cache_dir or run_dir.parent / ".cache", guard, rank, world_size, local_rank)

    def _begin(self, run_dir: Path, world_size: int) -> Guard:
        guard = Guard.begin_attempt(run_dir, self._claim.generation) if self._claim else None
        if world_size == 1:
            assert guard is not None
            return guard
        from trainers.collective import Group

        first = Group().from_first((guard.generation, guard.attempt) if guard else None)
        return guard or Guard.join(run_dir, *first)

    def close(self) -> None:
        """Let the run go, so that the next claim need not wait."""
        self.guard.close()
        if self._claim:
            self._claim.release()


def read_notes(run_dir: Path, offset: int) -> Iterator[tuple[str, int]]:
    """Each note after byte `offset` with the byte where it ends; what a killed worker tore is passed over."""
    with (run_dir / NOTES).open("rb") as handle:
        handle.seek(offset)
        for line in handle:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            with suppress(ValueError):
                yield json.loads(line)["text"], offset


def request_stop(run_dir: Path, generation: int, reason: str) -> None:
    """Ask the workers of this generation to stop at their next step boundary."""
    temporary = run_dir / f".{STOP_REQUEST}.tmp"
    temporary.write_text(json.dumps({"generation": generation, "reason": reason}), encoding="utf-8")
    os.replace(temporary, run_dir / STOP_REQUEST)


def requested_stop(run_dir: Path, generation: int) -> str | None:
    """Why the workers of this generation are asked to stop, if they are."""
    request = read_stop_request(run_dir)
    return request["reason"] if request and request["generation"] == generation else None


def read_stop_request(run_dir: Path) -> dict[str, Any] | None:
    """The standing request, whoever it is for."""
    try:
        return json.loads((run_dir / STOP_REQUEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
