"""Filesystem: every operation by which a checkpoint reaches the disk, as one value.

The checkpoint writer does nothing to the disk except through this value, so a test can record the operations,
replay every prefix of them, and let the k-th byte fail.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path


class Filesystem:
    """The real disk."""

    def mkdir(self, path: Path) -> None:
        """A directory at `path`; one that is there already will do."""
        with suppress(FileExistsError):
            os.mkdir(path)

    def create(self, path: Path) -> int:
        """Descriptor of a new, empty file for writing; what stood there before is emptied, a symbolic link refused."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def write(self, descriptor: int, data: memoryview | bytes) -> int:
        """How many of the bytes were written, at least one. Other threads run meanwhile."""
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Atomic; a file at `new` is replaced."""
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def fsync_dir(self, path: Path) -> None:
        """Make the names inside `path` durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free_space(self, path: Path) -> int:
        """Bytes this user may still write below `path` (a quota is not seen)."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize


def write_all(filesystem: Filesystem, descriptor: int, data: memoryview | bytes) -> None:
    """Write every byte, however many calls that takes."""
    view = memoryview(data)
    while len(view):
        view = view[filesystem.write(descriptor, view) :]


def write_file(filesystem: Filesystem, path: Path, data: bytes) -> None:
    """A durable file at `path` with exactly these bytes (its name is durable once its directory is synced)."""
    descriptor = filesystem.create(path)
    try:
        write_all(filesystem, descriptor, data)
        filesystem.fsync(descriptor)
    finally:
        filesystem.close(descriptor)


def remove_tree(filesystem: Filesystem, path: Path) -> None:
    """Nothing at `path` any more: links are unlinked, not followed; what another process removes first is no error."""
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            for name in sorted(os.listdir(path)):
                remove_tree(filesystem, path / name)
            filesystem.rmdir(path)
        else:
            filesystem.unlink(path)
