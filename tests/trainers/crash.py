"""Real processes that train and are killed at chosen points, forked from a server that has torch loaded already."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.config import RunConfig

VOLATILE = ("perf/", "mem/", "system/", "time_ms")


@dataclass(frozen=True)
class Plan:
    """What befalls one attempt at a run."""

    stop_at: int | None = None
    """ask for a stop before the update after this step"""
    kill_at: int | None = None
    """SIGKILL before the update after this step"""
    kill_in_save: int | None = None
    """SIGKILL at this file operation of the checkpoint writer"""
    sabotage: str | None = None
    """a piece of state that the restore withholds: the negative control"""
    build: str = "gpt"


@dataclass(frozen=True)
class Ending:
    """What an attempt left behind."""

    exitcode: int
    state: str | None
    digest: str | None
    """of every tensor of the newest checkpoint, and of the progress"""
    rows: list[dict[str, Any]] = field(default_factory=list)


_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch", "trainers.loop", "tests.trainers.attempts"])


def attempt(config: RunConfig, run_dir: Path, plan: Plan = Plan()) -> Ending:
    """One process's try at a run, from wherever the run stands."""
    from tests.trainers.attempts import play

    process = _server.Process(target=play, args=(config.model_dump(mode="json"), str(run_dir), plan))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the attempt hangs"
    return ending(run_dir, process.exitcode)


def ending(run_dir: Path, exitcode: int) -> Ending:
    from trainers.checkpoint import CheckpointStore
    from trainers.record import read_rows

    outcome = run_dir / "outcome.json"
    state = json.loads(outcome.read_text())["state"] if outcome.exists() and exitcode == 0 else None
    checkpoint = CheckpointStore(run_dir / "checkpoints", None).latest()
    rows = (
        [stable(row) for row, _ in read_rows(run_dir / "metrics.jsonl")] if (run_dir / "metrics.jsonl").exists() else []
    )
    return Ending(exitcode, state, digest(checkpoint) if checkpoint else None, rows)


def stable(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what the machine's speed decides."""
    return {name: value for name, value in row.items() if not name.startswith(VOLATILE)}


def digest(checkpoint: Any) -> str:
    """A hash over every tensor's bits, by name, and over the counts that go with them."""
    sha = hashlib.sha256()
    for stem in sorted(checkpoint.stems):
        for name, tensor in sorted(checkpoint.load(stem).items()):
            sha.update(f"{stem}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.contiguous().flatten().view(dtype=_bytes()).numpy().tobytes())
    progress = {key: value for key, value in checkpoint.meta["progress"].items() if key != "last"}
    sha.update(json.dumps([progress, checkpoint.meta["engine"], checkpoint.meta["loader"]], sort_keys=True).encode())
    return sha.hexdigest()


def _bytes() -> Any:
    import torch

    return torch.uint8


def killed(ending: Ending) -> bool:
    return ending.exitcode == -signal.SIGKILL


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
