"""CheckpointStore: save in the background, commit atomically, keep the newest and the best.

The protocol. Every rank writes its files into one staging directory, syncs them, and leaves a note of their sizes
and digests; rank 0 waits for the notes, writes state.json and the manifest, syncs, and, holding the run's guard,
renames the staging directory to its final name. Only then move the pointers, and only after that are older
checkpoints deleted. At every instant some directory verifies: the old one, or the new one.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trainers.claim import Guard
from trainers.config import NAME_PATTERN
from trainers.errors import CheckpointError, TrainingFailed
from trainers.filesystem import Filesystem, remove_tree, write_file
from trainers.manifest import (
    STATE,
    SUFFIX,
    Checkpoint,
    FileEntry,
    Manifest,
    best,
    committed_steps,
    newest,
    read_checkpoint,
    render_meta,
    sound_checkpoints,
    step_name,
)
from trainers.snapshot import SnapshotBuffer
from trainers.staging import SaveFailed, Staging, predicted_bytes, temporaries, temporary_name

__all__ = ["Checkpoint", "CheckpointStore", "SaveFailed", "SaveReport"]

HEAD_START_S = 0.01  # of the training before the writer wants the interpreter too: a save took 0.6 ms longer
RANK_TIMEOUT_S = 120.0  # how long a save waits for the part of another rank
NICENESS = 10  # of the writing thread: a tenth of a core that the training wants, all of one that it does not
CLOSING_TIMEOUT_S = 5.0  # and how long once the training is over, when that rank may be dead

log = logging.getLogger(__name__)
Files = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class SaveReport:
    """What the last committed save cost."""

    step: int
    size_bytes: int
    stall_s: float
    """how long `save` kept the training waiting"""
    durable_s: float
    """from the call of `save` until it was durable"""


@dataclass(frozen=True)
class _Snapshot:
    """One save, as it was when `save` was called."""

    step: int
    stems: tuple[str, ...]
    tensors: dict[tuple[str, str], torch.Tensor]
    meta: bytes
    best: bool
    staging: Staging
    called: float
    stall_s: float

    def payload(self) -> dict[str, dict[str, torch.Tensor]]:
        """File name -> tensor name -> tensor; a stem may hold nothing (plain SGD has no moments)."""
        files: dict[str, dict[str, torch.Tensor]] = {f"{stem}{SUFFIX}": {} for stem in self.stems}
        for (stem, name), tensor in self.tensors.items():
            files[f"{stem}{SUFFIX}"][name] = tensor
        return files


class CheckpointStore:
    """The checkpoints of one run, as one rank sees them. Every rank saves at the same steps.

    on_disk_full: `continue` warns, keeps the reason in `last_error` and lets the training go on; `stop` raises
    TrainingFailed at the next call. `guard` may be None for a store that only reads. `before_commit` runs in the
    background on rank 0 just before a checkpoint becomes visible: what must be durable before the steps up to it can
    no longer be replayed. `warn` is called from the background too.
    """

    def __init__(
        self,
        directory: Path,
        guard: Guard | None,
        *,
        rank: int = 0,
        world_size: int = 1,
        keep_last_n: int = 3,
        save_best: bool = True,
        on_disk_full: Literal["continue", "stop"] = "continue",
        filesystem: Filesystem | None = None,
        warn: Callable[[str], object] = log.warning,
        before_commit: Callable[[], object] = lambda: None,
        rank_timeout_s: float = RANK_TIMEOUT_S,
    ) -> None:
        self.directory = directory
        self.last_error: SaveFailed | None = None
        self.last_save: SaveReport | None = None
        self._guard = guard
        self._rank = rank
        self._world_size = world_size
        self._keep_last_n = keep_last_n
        self._save_best = save_best
        self._stop_on_failure = on_disk_full == "stop"
        self._fs = filesystem or Filesystem()
        self._warn = warn
        self.before_commit = before_commit
        self._rank_timeout_s = rank_timeout_s
        self._buffer: SnapshotBuffer[tuple[str, str]] = SnapshotBuffer()
        # One thread for all saves: starting one waits for it to run, submitting to one does not.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_stand_back)
        self._awaited = threading.Event()
        """somebody waits for the save in flight"""
        self._in_flight: Future[None] | None = None
        self._closed_at: float | None = None
        self._raise_next: BaseException | None = None
        self._saves = 0  # counted alike on every rank, so that each save has a staging directory of its own
        self._committed: int | None = None
        self._damaged: set[int] = set()

    # ---- saving, in the training's thread -------------------------------------------------------------

    def reserve(self, files: Files) -> None:
        """Set the snapshot's memory aside before training, so that the first save is as cheap as the others."""
        self._buffer.reserve(_flat(files))

    @property
    def snapshot_bytes(self) -> int:
        """Memory that snapshots hold on this rank."""
        return self._buffer.size_bytes

    def save(self, step: int, files: Files, meta: Mapping[str, Any], *, best: bool = False, wait: bool = False) -> None:
        """Copy the state as it is now, and write and commit it in the background (before returning, with `wait`).

        files: file stem -> name -> tensor, on any device; each rank gives its own stems. meta: JSON, rank 0's counts.
        A step is saved once: where a sound checkpoint of it stands, that one stays, and `best` still marks it.
        Raises Superseded when a newer claim owns the run, and TrainingFailed as `on_disk_full` says.
        """
        self._join()
        self._raise_if_due()
        called = time.perf_counter()
        for stem in files:
            assert NAME_PATTERN.fullmatch(stem), f"{stem!r} is no file name"
        assert self._guard is not None, "this store only reads"
        self._saves += 1
        path = self.directory / temporary_name(step_name(step), self._owner, self._saves)
        staging = Staging(path, self._fs, rank=self._rank, world_size=self._world_size)
        # Nothing is copied for a step that has just been committed: only the pointer may have to move.
        tensors = {} if step == self._committed else self._buffer.copy(_flat(files))
        text = render_meta(meta) if self._rank == 0 else b""
        stall_s = time.perf_counter() - called
        is_best = best and self._save_best
        snapshot = _Snapshot(step, tuple(files), tensors, text, is_best, staging, called, stall_s)
        self._awaited.clear()
        self._in_flight = self._writer.submit(self._run, snapshot)
        if wait:
            self.wait()

    def wait(self) -> bool:
        """Wait until the save in flight has ended; whether the last one is durable. Raises what `save` raises.

        Durable on rank 0 means committed; on the others, that their part is written.
        """
        self._join()
        self._raise_if_due()
        return self.last_error is None

    def close(self) -> None:
        """Let a save in flight end, but wait for no dead rank; nothing is saved afterwards. Raises nothing."""
        self._closed_at = time.monotonic()
        self._join()
        self._writer.shutdown()
        if self._rank == 0 and self._guard is not None:
            self._remove_own_staging(before_save=self._saves + 1)

    def _join(self) -> None:
        if self._in_flight is not None:
            self._awaited.set()
            self._in_flight.result()
            self._in_flight = None

    def _raise_if_due(self) -> None:
        error, self._raise_next = self._raise_next, None
        if error is not None:
            raise error

    # ---- reading ----------------------------------------------------------------------------------------

    def latest(self, *, verify: bool = True) -> Checkpoint | None:
        """The newest sound checkpoint; warns of each damaged one that it passes over."""
        found = sound_checkpoints(self.directory, verify=verify, warn=self._warn, damaged=self._damaged.add)
        return next(found, None)

    def best(self, *, verify: bool = True) -> Checkpoint | None:
        """The checkpoint with the best evaluation."""
        return best(self.directory, verify=verify, warn=self._warn)

    def best_or_latest(self) -> Checkpoint | None:
        return self.best() or self.latest()

    def at(self, step: int, *, verify: bool = False) -> Checkpoint:
        """The checkpoint of one step. Raises CheckpointError saying what is wrong with it."""
        return read_checkpoint(self.directory, step, verify=verify)

    def prune_staging(self) -> None:
        """Remove what earlier attempts left half-made; foreign files and our own stay."""
        assert self._guard is not None, "this store only reads"
        self._guard.check()
        for path, owner, _ in temporaries(self.directory):
            if owner < self._owner:
                remove_tree(self._fs, path)

    # ---- writing, in the background -----------------------------------------------------------------------

    def _run(self, snapshot: _Snapshot) -> None:
        """One save from snapshot to rotation; nothing escapes, everything is kept for the next call."""
        self._awaited.wait(HEAD_START_S)
        try:
            self._write_and_commit(snapshot)
            self.last_error = None
        except (OSError, SaveFailed) as error:
            snapshot.staging.abandon(snapshot.payload())
            self._note_failure(self._explain(snapshot, error))
        except BaseException as error:  # carried to the training's thread, which raises it
            snapshot.staging.abandon(snapshot.payload())
            self._raise_next = error

    def _note_failure(self, failure: SaveFailed) -> None:
        self.last_error = failure
        if self._stop_on_failure:
            self._raise_next = TrainingFailed(f"{failure} (checkpoint.on_disk_full is stop.)")
        else:
            self._warn(f"{failure} Training goes on.")

    def _write_and_commit(self, snapshot: _Snapshot) -> None:
        assert self._guard is not None
        self._guard.check()
        staging = snapshot.staging
        if self._rank > 0:
            staging.leave_note(staging.write_payload(snapshot.payload()))
            return
        self._remove_own_staging(before_save=self._saves)
        if self._stands(snapshot.step):
            self._move_pointers(snapshot, ("best",) if snapshot.best else ())
            return
        files = staging.write_payload(snapshot.payload())
        files |= staging.collect_notes(self._rank_timeout_s, self._check_waiting)
        files[STATE] = FileEntry.of(snapshot.meta)
        manifest = Manifest(snapshot.step, *self._owner, self._world_size, snapshot.best, files)
        staging.write_manifest(manifest, snapshot.meta)
        self.before_commit()
        self._publish(snapshot)
        self._move_pointers(snapshot, ("latest", "best") if snapshot.best else ("latest",))
        size = sum(entry.size for entry in files.values())
        self.last_save = SaveReport(snapshot.step, size, snapshot.stall_s, time.perf_counter() - snapshot.called)
        self._rotate(snapshot.step)

    def _check_waiting(self) -> None:
        """Ends a wait that has become useless."""
        assert self._guard is not None
        self._guard.check()
        if self._closed_at is not None and time.monotonic() - self._closed_at > CLOSING_TIMEOUT_S:
            raise SaveFailed("the training ended before every rank had written its part")

    def _stands(self, step: int) -> bool:
        """Whether a sound checkpoint of this step is there already."""
        if step == self._committed:
            return True
        if not os.path.lexists(self.directory / step_name(step)):
            return False
        try:
            read_checkpoint(self.directory, step, verify=True)
        except CheckpointError:
            return False
        return True

    def _publish(self, snapshot: _Snapshot) -> None:
        """Give the staging directory its name, if the run is still ours; then make the name durable."""
        assert self._guard is not None
        final = self.directory / step_name(snapshot.step)
        with self._guard.held():
            if os.path.lexists(final):  # damaged, as `_stands` found
                self._fs.rename(final, self._aside(snapshot.step))
            self._fs.rename(snapshot.staging.path, final)
        self._fs.fsync_dir(self.directory)
        self._committed = snapshot.step
        self._damaged.discard(snapshot.step)

    def _move_pointers(self, snapshot: _Snapshot, names: tuple[str, ...]) -> None:
        assert self._guard is not None
        for name in names:
            temporary = self.directory / temporary_name(name, self._owner)
            write_file(self._fs, temporary, f"{step_name(snapshot.step)}\n".encode())
            with self._guard.held():
                self._fs.rename(temporary, self.directory / name)
        if names:
            self._fs.fsync_dir(self.directory)

    def _rotate(self, committed: int) -> None:
        """Delete what need not be kept. A failure here is no failed save."""
        assert self._guard is not None
        try:
            for step in self._superfluous(committed):
                aside = self._aside(step)
                with self._guard.held():  # one rename, so no half-deleted checkpoint ever bears its name
                    self._fs.rename(self.directory / step_name(step), aside)
            for path, owner, _ in temporaries(self.directory):
                if path.name.startswith(".tmp-old-") and owner <= self._owner:
                    remove_tree(self._fs, path)
        except OSError as error:
            self._warn(f"old checkpoints in {self.directory} could not be deleted: {error.strerror or error}")

    def _superfluous(self, committed: int) -> list[int]:
        """Steps before the one just committed that are neither among the newest sound ones nor the best."""
        steps = committed_steps(self.directory)
        sound = [step for step in steps if step not in self._damaged]
        keep = {committed, *sound[-self._keep_last_n :]}
        if self._save_best:
            found = best(self.directory, verify=False, warn=lambda text: None)
            keep |= {found.step} if found else set()
        return [step for step in steps if step < committed and step not in keep]

    def _remove_own_staging(self, before_save: int) -> None:
        """What ranks wrote for saves that were given up or not needed."""
        for path, owner, save in temporaries(self.directory):
            if owner == self._owner and save is not None and save < before_save:
                with suppress(OSError):  # a late rank may be writing there still: next time, then
                    remove_tree(self._fs, path)

    @property
    def _owner(self) -> tuple[int, int]:
        assert self._guard is not None
        return self._guard.generation, self._guard.attempt

    def _aside(self, step: int) -> Path:
        return self.directory / temporary_name(f"old-{step_name(step)}", self._owner, self._saves)

    def _explain(self, snapshot: _Snapshot, error: OSError | SaveFailed) -> SaveFailed:
        """The failure in full: what, why, bytes needed and free, and what one still has."""
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        needed = predicted_bytes(snapshot.payload()) + len(snapshot.meta)
        with suppress(OSError):
            free = self._fs.free_space(self.directory)
            reason += f"; it needs {needed:,} bytes and {free:,} are free in {self.directory}"
        good = newest(self.directory, verify=False, warn=lambda text: None)
        stands = f"{good.path.name} stands." if good else "There is no earlier one."
        failure = SaveFailed(f"checkpoint {step_name(snapshot.step)} was not saved: {reason}. {stands}")
        failure.__cause__ = error
        return failure


def _stand_back() -> None:
    """Let this thread take what the others leave of the cores: a step beside one that hashes took twice as long."""
    if sys.platform == "linux":  # elsewhere a priority is the whole process's
        os.setpriority(os.PRIO_PROCESS, 0, min(os.getpriority(os.PRIO_PROCESS, 0) + NICENESS, 19))


def _flat(files: Files) -> dict[tuple[str, str], torch.Tensor]:
    return {(stem, name): tensor for stem, tensors in files.items() for name, tensor in tensors.items()}
