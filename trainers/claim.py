"""Claim and Guard: one process at a time writes into a run, and one that lost the right writes nothing more.

`RUNS/NAME/claim` is locked (flock) by the driver for its life, so the lock dies with it, however it dies. The file
says who holds it and carries two numbers: the generation, which each claim raises, and the attempt, which each start
of the workers raises. Workers outlive a killed driver by seconds; so whoever is about to make something visible in
the run (a commit, an append) does it inside `guard.held()`, which holds a second, short lock and refuses when the
record is no longer the one the guard began with. A claimant changes the record under that same lock: after its
claim stands, no older writer can do anything.
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from trainers.errors import Superseded, UserError
from trainers.locks import POLL_S, Lock
from trainers.process import Process

CLAIM = "claim"
WRITE_LOCK = ".write-lock"
GENERATION = ".generation"  # the last generation given out, should the claim file itself be torn by a power cut
RECORD_BYTES = 512  # one disk sector, rewritten in place: the lock is on the file, so the file cannot be replaced
QUIET_S = 0.1  # a wait shorter than this is not worth a sentence
GRACE_S = 0.25  # a process that still looks alive after this is not being killed right now

_GENERATION_IN_NAME = re.compile(r"\.tmp-.*-(\d+)\.\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Holder:
    """What the claim file says about its holder."""

    generation: int
    attempt: int
    pid: int
    host: str
    started: str

    @property
    def alive(self) -> bool | None:
        """Whether the process runs now; None when it is on another host, where nobody can tell from here."""
        return Process(self.pid, self.host, self.started).is_alive()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "nobody"


def holder(run_dir: Path) -> Holder | None:
    """Who holds or last held the run; None where it was let go, or never claimed. Takes no lock, waits for nobody."""
    record = _parse(_read(run_dir / CLAIM))
    return record if record and record.pid else None


class Claim:
    """The right to write into a run, for the life of this process or until `release`."""

    def __init__(self, run_dir: Path, lock: Lock, write_lock: Lock, record: Holder):
        self.run_dir = run_dir
        self._lock = lock
        self._write_lock = write_lock
        self._record = record

    @classmethod
    def acquire(cls, run_dir: Path, *, wait_s: float = 30.0, say: Callable[[str], object] = print) -> Claim:
        """The claim on `run_dir`, with a generation greater than any before.

        Raises UserError at once where a live process of this host holds it, and after `wait_s` where the holder is
        ending or on another host.
        """
        try:
            return cls._acquire(run_dir, wait_s, say)
        except OSError as error:
            raise UserError(
                f"{run_dir} cannot be claimed: {error.strerror or error}. The runs folder must be writable and on a "
                f"file system with locks; choose another with --runs-dir."
            ) from error

    @classmethod
    def _acquire(cls, run_dir: Path, wait_s: float, say: Callable[[str], object]) -> Claim:
        run_dir.mkdir(parents=True, exist_ok=True)
        _refuse_other_than_files(run_dir)
        deadline = time.monotonic() + wait_s
        lock = _lock_claim(run_dir, deadline, wait_s, say)
        write_lock = Lock(run_dir / WRITE_LOCK)
        try:
            if not write_lock.take_before(deadline):
                raise UserError(
                    f"{run_dir}: an old worker has held {WRITE_LOCK} for {wait_s:g} s; end it and try again."
                )
            try:
                me = Process.current()
                record = Holder(_greatest_generation(run_dir) + 1, 0, me.pid, me.host, me.started)
                _write_generation(run_dir, record.generation)
                _write(run_dir / CLAIM, record)
            finally:
                write_lock.let_go()
        except BaseException:
            lock.close()
            write_lock.close()
            raise
        return cls(run_dir, lock, write_lock, record)

    @property
    def generation(self) -> int:
        return self._record.generation

    def release(self) -> None:
        """Let the run go: the guards of this generation write nothing more, and the next claim need not wait."""
        if self._lock.closed:
            return
        self._write_lock.take()
        try:
            current = _parse(_read(self.run_dir / CLAIM))
            if current and (current.generation, current.started) == (self.generation, self._record.started):
                _write(self.run_dir / CLAIM, Holder(current.generation, current.attempt, 0, "", ""))
        finally:
            self._write_lock.let_go()
            self._write_lock.close()
            self._lock.close()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Guard:
    """A worker's proof that it belongs to the present claim and attempt."""

    def __init__(self, run_dir: Path, lock: Lock, record: Holder):
        self.generation = record.generation
        self.attempt = record.attempt
        self._path = run_dir / CLAIM
        self._name = str(self._path)
        self._expected = _render(record)
        self._lock = lock
        self._threads = threading.Lock()  # flock does not keep two threads of one process apart

    @classmethod
    def begin_attempt(cls, run_dir: Path, generation: int) -> Guard:
        """The guard of the first worker of a group: raises the attempt, so that workers before it are shut out.

        Raises Superseded when the run's generation is another.
        """
        lock = Lock(run_dir / WRITE_LOCK)
        lock.take()
        try:
            record = _require(run_dir, generation)
            record = Holder(**{**asdict(record), "attempt": record.attempt + 1})
            _write(run_dir / CLAIM, record)
        except BaseException:
            lock.close()
            raise
        lock.let_go()
        return cls(run_dir, lock, record)

    @classmethod
    def join(cls, run_dir: Path, generation: int, attempt: int) -> Guard:
        """The guard of another worker of that group. Raises Superseded when the run has gone on without it."""
        lock = Lock(run_dir / WRITE_LOCK)
        lock.take()
        try:
            record = _require(run_dir, generation)
            if record.attempt != attempt:
                raise Superseded(f"{run_dir}: attempt {attempt} is over, attempt {record.attempt} is at work.")
        except BaseException:
            lock.close()
            raise
        lock.let_go()
        return cls(run_dir, lock, record)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the run ours during the body: nobody can claim it, and no other worker writes, until the body ends.

        Raises Superseded, and runs nothing, when it is not ours any more. Keep the body short; it does not nest.
        """
        with self._threads:
            self._lock.take()
            try:
                self._require_current()
                yield
            finally:
                self._lock.let_go()

    def check(self) -> None:
        """Raises Superseded when the run is not ours any more."""
        with self.held():
            pass

    def close(self) -> None:
        self._lock.close()

    def _require_current(self) -> None:
        # By name each time: were the folder deleted and made anew, an open descriptor would still see the old file;
        # and opening is when a network file system looks at the server.
        found = _read(self._name)
        if found != self._expected:
            raise Superseded(
                f"{self._path.parent}: generation {self.generation}, attempt {self.attempt} may no longer write; "
                f"the claim says {_told(_parse(found))}."
            )


def _refuse_other_than_files(run_dir: Path) -> None:
    """Opening a FIFO or a device for the lock would wait for ever, or do something else."""
    for name in (CLAIM, WRITE_LOCK, GENERATION):
        path = run_dir / name
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path} is no regular file, and the run needs one of that name: move it away.")


# ---- taking the claim's lock --------------------------------------------------------------------------


def _lock_claim(run_dir: Path, deadline: float, wait_s: float, say: Callable[[str], object]) -> Lock:
    """The lock on the claim file, once its holder is gone."""
    started = time.monotonic()
    seen_alive: tuple[Holder, float] | None = None
    said = False
    while True:
        lock = Lock(run_dir / CLAIM)
        if lock.take_now() and lock.is_of_path():
            return lock
        lock.close()
        now = time.monotonic()
        found = _parse(_read(run_dir / CLAIM))
        if found and found.alive:
            if seen_alive is None or seen_alive[0].generation != found.generation:
                seen_alive = (found, now)
            elif now - seen_alive[1] >= GRACE_S:
                raise UserError(f"{run_dir.name} is in use by {found}. Stop that one first, or choose another --name.")
        else:
            seen_alive = None
            if not said and now - started >= QUIET_S:
                who = found or "a process that is ending"
                say(f"{run_dir.name} is still locked by {who}; waiting up to {wait_s:g} s for it.")
                said = True
            if now >= deadline:
                raise UserError(
                    f"{run_dir.name} is still locked by {found or 'an unknown process'} after {wait_s:g} s. "
                    f"End that process, or choose another --name."
                )
        time.sleep(POLL_S)


# ---- the record ----------------------------------------------------------------------------------------


def _render(record: Holder) -> bytes:
    text = json.dumps(asdict(record)).encode()
    assert len(text) < RECORD_BYTES
    return text.ljust(RECORD_BYTES - 1) + b"\n"


def _parse(data: bytes) -> Holder | None:
    """The record, or None for a file that is empty, torn or foreign."""
    try:
        record = Holder(**json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = (record.generation, record.attempt, record.pid)
    sound = all(type(number) is int and number >= 0 for number in numbers)
    return record if sound and isinstance(record.host, str) and isinstance(record.started, str) else None


def _read(path: Path | str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would keep us waiting
    except FileNotFoundError:
        return b""
    try:
        return os.read(descriptor, RECORD_BYTES * 2)
    finally:
        os.close(descriptor)


def _write(path: Path, record: Holder) -> None:
    """In place, under the write lock."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.pwrite(descriptor, _render(record), 0)
        os.ftruncate(descriptor, RECORD_BYTES)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require(run_dir: Path, generation: int) -> Holder:
    record = _parse(_read(run_dir / CLAIM))
    if record is None or record.generation != generation or not record.pid:
        raise Superseded(f"{run_dir}: generation {generation} may no longer write; the claim says {_told(record)}.")
    return record


def _told(record: Holder | None) -> str:
    return f"generation {record.generation}, attempt {record.attempt}, {record}" if record else "nothing readable"


# ---- the generation never goes back ----------------------------------------------------------------------


def _greatest_generation(run_dir: Path) -> int:
    """The last generation given out, from every place that knows; 0 for a new run."""
    record = _parse(_read(run_dir / CLAIM))
    counted = _number(_read(run_dir / GENERATION))
    known = [record.generation if record else 0, counted or 0]
    if record is None or counted is None:  # only then: a run may hold many checkpoints
        known += _generations_of_checkpoints(run_dir / "checkpoints")
    return max(known)


def _generations_of_checkpoints(directory: Path) -> Iterator[int]:
    for entry in directory.iterdir() if directory.is_dir() else ():
        if named := _GENERATION_IN_NAME.fullmatch(entry.name):
            yield int(named[1])
        manifest = entry / "manifest.json"
        if manifest.is_file() and (found := re.search(rb'"generation":\s*(\d{1,18})\b', manifest.read_bytes())):
            yield int(found[1])


def _number(data: bytes) -> int | None:
    return int(data) if re.fullmatch(rb"\d{1,18}\n", data) else None


def _write_generation(run_dir: Path, generation: int) -> None:
    """Durably, before the claim file says it."""
    temporary = run_dir / f"{GENERATION}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        os.write(descriptor, f"{generation}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(temporary, run_dir / GENERATION)
    folder = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
