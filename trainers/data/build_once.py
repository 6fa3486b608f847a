"""A folder in the cache that one process builds and every other waits for; whole or absent, never half."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainers.data.progress import Progress
from trainers.errors import DataError

POLL_S = 0.05
TELL_S = 1.0
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def build_once(target: Path, build: Callable[[Path], None], progress: Progress) -> None:
    """Makes the folder `target` by calling `build(folder)` unless it is there.

    Two processes may ask at once: the second waits for the first's lock, which dies with its holder, and finds the
    folder made. It is built under another name and renamed when it is on the disk, so a killed builder leaves nothing
    that is believed, and the next one sweeps up what it left.

    Raises:
        DataError: the disk is full or the cache must not be written.
    """
    if target.is_dir():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, progress):
            if not target.is_dir():
                _build(target, build)
    except OSError as error:
        raise unwritable(target, error) from None


def unwritable(path: Path, error: OSError) -> DataError | OSError:
    """The error for a cache that cannot be written; `error` itself where it is about something else."""
    if error.errno in NO_ROOM:
        return DataError(f"no room on the disk for {path} ({error.strerror}). Free some, or set another --runs-dir.")
    if error.errno in NOT_ALLOWED:
        return DataError(f"{path} cannot be written ({error.strerror}). Set another --runs-dir.")
    return error


def _build(target: Path, build: Callable[[Path], None]) -> None:
    for left in target.parent.glob(f".tmp-{target.name}-*"):  # we hold the lock: whoever made them is dead
        shutil.rmtree(left)
    temporary = target.parent / f".tmp-{target.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        build(temporary)
        for file in temporary.iterdir():
            _fsync(file)
        _fsync(temporary)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _fsync(target.parent)


@contextmanager
def _locked(target: Path, progress: Progress) -> Iterator[None]:
    with open(target.parent / f".lock-{target.name}", "ab") as lock:
        tell = 0.0
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= tell:
                    tell = time.monotonic() + TELL_S
                    progress(0, 0, f"waiting for another process that builds {target.name[:12]}")
                time.sleep(POLL_S)
        yield


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
