"""The SQLite file under the runs folder: made once, private, and tried before anyone waits for MLflow on it."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainers.errors import UserError

BUSY_S = 20.0
"""how long another writer is waited for"""
SQLITE = "sqlite:///"


def sqlite_uri(path: Path) -> str:
    """The SQLAlchemy URI of a database file; UserError for a path that such a URI cannot hold."""
    if "?" in str(path):
        raise UserError(
            f"the runs folder {path.parent} has a '?' in its path, which no database URI can hold: rename it."
        )
    return f"{SQLITE}{path}"


def sqlite_path(uri: str) -> Path | None:
    """The absolute file behind a SQLite URI; None for every other kind of store."""
    if not uri.startswith(SQLITE):
        return None
    return Path(uri.removeprefix(SQLITE).split("?")[0]).absolute()


@contextmanager
def creating(path: Path, way_out: str) -> Iterator[None]:
    """Hold the right to create or migrate the database, having made sure that it can be written.

    The lock is a file beside the database and dies with its holder: two first runs in one folder must not migrate the
    same schema at once. Raises UserError, with `way_out`, where the file cannot be made, opened or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"cannot write the MLflow store {path}: {error.strerror}. {way_out}") from error
    try:
        _wait_for_lock(lock, path, way_out)
        _try_out(path, way_out)
        yield
    finally:
        os.close(lock)


def _wait_for_lock(lock: int, path: Path, way_out: str) -> None:
    deadline = time.monotonic() + 3 * BUSY_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(f"another process has been creating {path} for a minute. {way_out}") from None
            time.sleep(0.02)


def _try_out(path: Path, way_out: str) -> None:
    """Open for writing, with the mode a private file should have: metrics and tags are nobody else's business."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            connection.execute("SELECT count(*) FROM sqlite_master")
        finally:
            connection.close()
    except OSError as error:
        raise UserError(f"cannot write the MLflow store {path}: {error.strerror}. {way_out}") from error
    except sqlite3.Error as error:
        raise UserError(f"cannot use the MLflow store {path}: {error}. {way_out}") from error
