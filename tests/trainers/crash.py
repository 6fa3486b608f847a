"""Real processes that train and are killed at chosen points, forked from a server that has torch loaded already."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from trainers.config import RunConfig

PATIENCE_S = 100.0  # for an attempt that ends by itself
FAREWELL_S = 20.0  # for the other ranks, once one has failed
VOLATILE = ("perf/", "mem/", "system/", "time_ms")


@dataclass(frozen=True)
class Plan:
    """What befalls one attempt at a run."""

    stop_at: int | None = None
    """ask for a stop before the update after this step"""
    stop_reason: str = "test"
    kill_at: int | None = None
    """SIGKILL before the update after this step"""
    rows_arrived: bool = False
    """whether that kill waits until the rows before it have left the process, which takes a tenth of a second"""
    kill_in_save: int | None = None
    """SIGKILL at this file operation of the checkpoint writer"""
    sabotage: str | None = None
    """a piece of state that the restore withholds: the negative control"""
    build: str = "gpt"
    rank: int = 0
    """whom all of the above befalls"""
    poison: tuple[int, ...] = ()
    """the last rank's loss is NaN in the updates after these steps"""
    left_out: tuple[int, ...] = ()
    """the engine leaves out the updates after these steps although their loss is sound: the reference"""


@dataclass(frozen=True)
class Ending:
    """What an attempt left behind."""

    exitcode: int
    """of the rank that was killed, else of one that failed, else 0; a TrainingFailed is 3"""
    state: str | None
    digest: str | None
    """of every tensor of the newest checkpoint, and of the progress"""
    rows: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    tensors: str | None = None
    """of every tensor of the newest checkpoint alone"""
    stems: tuple[str, ...] = ()
    """the files whose tensors those are"""
    step: int | None = None
    """of the newest checkpoint"""
    failure: str = ""
    """what TrainingFailed said on rank 0"""


_server = multiprocessing.get_context("forkserver")
# torch loads _inductor for its first optimizer: a second or two, which every attempt would pay. Nothing that starts
# threads belongs here (datasets does, through pyarrow): a fork beside a thread may hang.
_server.set_forkserver_preload(["torch", "torch._inductor", "trainers.loop", "tests.trainers.attempts"])


def attempt(config: RunConfig, run_dir: Path, plan: Plan = Plan(), *, workers: int = 1) -> Ending:
    """One try of `workers` processes at a run, from wherever the run stands."""
    from tests.trainers.attempts import play

    assert config.workers == workers
    settings = config.model_dump(mode="json")
    with tempfile.TemporaryDirectory(prefix="ranks-") as meeting_place:
        ranks = [
            _server.Process(target=play, args=(settings, str(run_dir), plan, rank, workers, meeting_place))
            for rank in range(workers)
        ]
        for process in ranks:
            process.start()
        codes = watch(ranks, Path(meeting_place))
    return ending(run_dir, min(codes) or max(codes))


def watch(ranks: Sequence[BaseProcess], meeting_place: Path) -> list[int]:
    """Exit codes of the ranks that ended by themselves or as planned.

    Where one is killed so are the others, as Ray would; where one fails the others have some time to follow.
    """
    deadline = time.monotonic() + PATIENCE_S
    running = list(ranks)
    while running and not any(process.exitcode for process in ranks):
        if not wait([process.sentinel for process in running], timeout=deadline - time.monotonic()):
            raise AssertionError(f"the attempt hangs: {where(running, meeting_place)}")
        running = [process for process in running if process.exitcode is None]
    if not any(process.exitcode and process.exitcode < 0 for process in ranks):
        for process in running:
            process.join(FAREWELL_S)
    codes = [process.exitcode for process in ranks if process.exitcode is not None]
    kill(ranks)
    return codes


def where(ranks: Sequence[BaseProcess], meeting_place: Path) -> str:
    """The stacks of all threads of ranks that hang, which are then killed."""
    for process in ranks:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGUSR1)
    time.sleep(1)
    kill(ranks)
    return "\n".join(path.read_text() for path in meeting_place.glob("stack-*.txt"))


def kill(ranks: Sequence[BaseProcess]) -> None:
    for process in ranks:
        if process.exitcode is None:
            process.kill()
        process.join()


def ending(run_dir: Path, exitcode: int) -> Ending:
    from trainers.checkpoint import CheckpointStore
    from trainers.record import read_rows

    path, failure = run_dir / "outcome.json", run_dir / "failure-0.txt"
    outcome = json.loads(path.read_text()) if path.exists() and exitcode == 0 else {}
    checkpoint = CheckpointStore(run_dir / "checkpoints", None).latest()
    rows = [stable(row) for row, _ in read_rows(run_dir / "metrics.jsonl")]
    return Ending(
        exitcode,
        outcome.get("state"),
        digest(checkpoint) if checkpoint else None,
        rows,
        outcome.get("reason"),
        tensor_hash(checkpoint).hexdigest() if checkpoint else None,
        tuple(sorted(checkpoint.stems)) if checkpoint else (),
        checkpoint.step if checkpoint else None,
        failure.read_text() if failure.exists() and exitcode == 3 else "",
    )


def stable(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what the machine's speed decides."""
    return {name: value for name, value in row.items() if not name.startswith(VOLATILE)}


def digest(checkpoint: Any) -> str:
    """A hash over every tensor's bits, by name, and over the counts that go with them."""
    sha = tensor_hash(checkpoint)
    progress = {key: value for key, value in checkpoint.meta["progress"].items() if key != "last"}
    sha.update(json.dumps([progress, checkpoint.meta["engine"], checkpoint.meta["loader"]], sort_keys=True).encode())
    return sha.hexdigest()


def tensor_hash(checkpoint: Any) -> Any:
    """SHA-256 over every tensor's bits, by file and name; it can be fed further."""
    sha = hashlib.sha256()
    for stem in sorted(checkpoint.stems):
        for name, tensor in sorted(checkpoint.load(stem).items()):
            sha.update(f"{stem}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.contiguous().flatten().view(dtype=_bytes()).numpy().tobytes())
    return sha


def _bytes() -> Any:
    import torch

    return torch.uint8


def killed(ending: Ending) -> bool:
    return ending.exitcode == -signal.SIGKILL


def finished(ending: Ending) -> Ending:
    """The same, of which it is known that the run came to its end."""
    assert (ending.exitcode, ending.state) == (0, "finished")
    return ending


def assert_same(ending: Ending, whole: Ending) -> None:
    """The same bits in the checkpoint, and the same metrics, each once."""
    assert ending.digest == whole.digest
    assert merged(ending.rows) == merged(whole.rows)


def merged(rows: list[dict[str, Any]]) -> dict[tuple[int, str], Any]:
    """(step, metric) -> value; an AssertionError where one stands twice."""
    table: dict[tuple[int, str], Any] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("step", "tokens", "phase"):
                continue
            assert (row["step"], name) not in table, f"{name} stands twice at step {row['step']}"
            table[row["step"], name] = value
    return table
