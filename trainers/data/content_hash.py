"""The sha256 of files, remembered by what the system says about them, so that an unchanged corpus costs a stat."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from stat import S_ISREG

from trainers.data.build_once import unwritable
from trainers.data.reading import unreadable
from trainers.errors import DataError

CORPUS_FORMAT = 1  # part of every content hash: raise it when the same bytes come to yield other text
SETTLED_NS = 2_000_000_000  # a file touched more recently could change again within one tick of its clock


def digest(*parts: object) -> str:
    """sha256 over the JSON of the parts, 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _not_waiting(path: str, flags: int) -> int:
    """Opens a FIFO without waiting for its writer, so that it can be refused."""
    return os.open(path, flags | os.O_NONBLOCK)


class FileHashes:
    """sha256 of files by (path, size, mtime, inode); kept below `directory` between processes where one is given."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._known: dict[str, str] = {}

    def sha256(self, path: Path) -> str:
        """64 hex digits over the file's bytes as stored. Raises DataError where it cannot be read."""
        try:
            with open(path, "rb", opener=_not_waiting) as file:
                stat = os.fstat(file.fileno())
                if not S_ISREG(stat.st_mode):
                    raise DataError(f"{path}: not a regular file. Save what it gives to a file first.")
                key = digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)
                known = self._known.get(key) or self._read(key)
                if known is not None:
                    return known
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(path, error) from None
        if time.time_ns() - stat.st_mtime_ns > SETTLED_NS:
            self._remember(key, found)
        return found

    def _read(self, key: str) -> str | None:
        if self._directory is None:
            return None
        try:
            known = (self._directory / key).read_text()
        except OSError:
            return None
        return known if len(known) == 64 else None

    def _remember(self, key: str, known: str) -> None:
        self._known[key] = known
        if self._directory is None:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            temporary = self._directory / f".{key}-{os.getpid()}"
            temporary.write_text(known)
            os.replace(temporary, self._directory / key)
        except OSError as error:
            raise unwritable(self._directory, error) from None
