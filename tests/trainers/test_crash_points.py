"""Every crash point of the checkpoint writer leaves the old checkpoint or the new one, whole.

The writer's operations on the disk are recorded. Then the disk is rebuilt as a crash could have left it: after every
prefix of the operations, with the write under way torn at several bytes, and, for a power cut, with everything lost
that no fsync had made durable: contents, and names (created, renamed, removed) of directories not yet synced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.checkpoint import Checkpoint, CheckpointStore
from trainers.claim import Claim, Guard
from trainers.filesystem import Filesystem

State = tuple[int, str]  # step and digest of everything a checkpoint gives back


# ---- recording -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    kind: str
    path: str = ""
    new: str = ""
    file: int = -1
    data: bytes = b""


class Recorder(Filesystem):
    """The real disk, with a list of what was done to it below `root`."""

    def __init__(self, root: Path):
        self.root = root
        self.ops: list[Op] = []
        self._files: dict[int, int] = {}
        self._count = 0

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self.ops.append(Op("mkdir", self._relative(path)))

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._count += 1
        self._files[descriptor] = self._count
        self.ops.append(Op("create", self._relative(path), file=self._count))
        return descriptor

    def write(self, descriptor: int, data: memoryview | bytes) -> int:
        count = super().write(descriptor, data)
        self.ops.append(Op("write", file=self._files[descriptor], data=bytes(data[:count])))
        return count

    def fsync(self, descriptor: int) -> None:
        self.ops.append(Op("fsync", file=self._files[descriptor]))

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.ops.append(Op("rename", self._relative(old), self._relative(new)))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.ops.append(Op("unlink", self._relative(path)))

    def rmdir(self, path: Path) -> None:
        super().rmdir(path)
        self.ops.append(Op("rmdir", self._relative(path)))

    def fsync_dir(self, path: Path) -> None:
        self.ops.append(Op("fsync_dir", self._relative(path)))


class Quick(Filesystem):
    """The real disk without waiting for it: nothing crashes while the law is being checked."""

    def fsync(self, descriptor: int) -> None:
        pass

    def fsync_dir(self, path: Path) -> None:
        pass


# ---- a disk after a crash --------------------------------------------------------------------------------

TEARS = 14  # about as many points are tried inside each write
NAMES = ("mkdir", "create", "rename", "unlink", "rmdir")
DIRECTORY = -1


@dataclass
class Disk:
    """Names and contents: path -> file number, file number -> bytes."""

    names: dict[str, int] = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)

    @staticmethod
    def of(folder: Path) -> Disk:
        disk = Disk()
        for number, path in enumerate(sorted(folder.rglob("*")), start=10**6):
            name = str(path.relative_to(folder))
            disk.names[name] = DIRECTORY if path.is_dir() else number
            if path.is_file():
                disk.contents[number] = path.read_bytes()
        return disk

    def apply(self, op: Op) -> None:
        """A change of names; without effect where what it builds on was lost."""
        parent = op.path.rpartition("/")[0]
        if parent and parent not in self.names and op.kind in ("mkdir", "create"):
            return
        match op.kind:
            case "mkdir":
                self.names.setdefault(op.path, DIRECTORY)
            case "create":
                self.names[op.path] = op.file
            case "rename" if op.path in self.names:
                moved = {name: number for name, number in self.names.items() if (name + "/").startswith(op.path + "/")}
                for name, number in moved.items():
                    del self.names[name]
                    self.names[op.new + name[len(op.path) :]] = number
            case "unlink":
                self.names.pop(op.path, None)
            case "rmdir":  # what is inside goes with it, even where its own removal was not durable
                self.names = {
                    name: number for name, number in self.names.items() if not (name + "/").startswith(op.path + "/")
                }

    def files(self) -> dict[str, bytes | None]:
        return {
            name: None if number == DIRECTORY else self.contents.get(number, b"") for name, number in self.names.items()
        }


def crashes(before: Disk, ops: list[Op]) -> Iterator[dict[str, bytes | None]]:
    """Every way the disk may look after a crash somewhere in `ops`: path -> contents (None: a directory)."""
    for point in range(len(ops) + 1):
        for torn in torn_writes(ops, point):
            yield after(before, torn, set(range(len(torn))), durable_only=False)  # a killed process
        done = ops[:point]
        synced = names_made_durable(done)
        loose = [index for index, op in enumerate(done) if op.kind in NAMES and index not in synced]
        survivors = [set(loose[:count]) for count in range(len(loose) + 1)]
        survivors += [set(loose) - {lost} for lost in loose]
        for kept in survivors:  # a power cut
            for durable_only in (True, False):
                yield after(before, done, synced | kept, durable_only)


def torn_writes(ops: list[Op], point: int) -> Iterator[list[Op]]:
    """The operations before `point`, and the one under way torn at several bytes if it is a write."""
    yield ops[:point]
    if point < len(ops) and ops[point].kind == "write":
        size = len(ops[point].data)
        for cut in sorted({1, size - 1, *(size * part // TEARS for part in range(1, TEARS))} - {0, size}):
            yield [*ops[:point], Op("write", file=ops[point].file, data=ops[point].data[:cut])]


def names_made_durable(ops: list[Op]) -> set[int]:
    durable: set[int] = set()
    for index, op in enumerate(ops):
        if op.kind == "fsync_dir":
            durable |= {
                i for i, earlier in enumerate(ops[:index]) if earlier.kind in NAMES and parent(earlier) == op.path
            }
    return durable


def parent(op: Op) -> str:
    return (op.new or op.path).rpartition("/")[0] or "."


def after(before: Disk, ops: list[Op], survived: set[int], durable_only: bool) -> dict[str, bytes | None]:
    disk = Disk(dict(before.names), dict(before.contents))
    written: dict[int, bytes] = {}
    for index, op in enumerate(ops):
        if op.kind == "write":
            written[op.file] = written.get(op.file, b"") + op.data
            if not durable_only:
                disk.contents[op.file] = written[op.file]
        elif op.kind == "fsync":
            disk.contents[op.file] = written.get(op.file, b"")
        elif op.kind in NAMES and index in survived:
            disk.apply(op)
    return disk.files()


def build(files: dict[str, bytes | None], folder: Path) -> None:
    folder.mkdir()
    for name, data in sorted(files.items()):
        if data is None:
            (folder / name).mkdir(exist_ok=True)
        else:
            (folder / name).write_bytes(data)


# ---- the law -----------------------------------------------------------------------------------------------


def state(step: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(16, 4, generator=generator), "b": torch.randn(5, generator=generator).bfloat16()}
    moments = {"w/exp_avg": torch.randn(16, 4, generator=generator), "step": torch.tensor(step)}
    files = {"model": weights, "optimizer": moments, "rank-00000": {"rng": torch.arange(8, dtype=torch.uint8) + step}}
    return files, {"progress": {"step": step, "best": float("inf")}}


def digest(files: dict[str, dict[str, torch.Tensor]], meta: dict[str, Any]) -> str:
    text = hashlib.sha256(repr(meta).encode())
    for stem, tensors in sorted(files.items()):
        for name, tensor in sorted(tensors.items()):
            text.update(f"{stem} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            text.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return text.hexdigest()


def of(step: int) -> State:
    return step, digest(*state(step))


def restored(checkpoint: Checkpoint | None) -> State | None:
    if checkpoint is None:
        return None
    return checkpoint.step, digest({stem: checkpoint.load(stem) for stem in checkpoint.stems}, checkpoint.meta)


@dataclass
class Bench:
    """Where crashes are replayed."""

    folder: Path
    guard: Guard
    checked: int = 0

    def store(self, directory: Path, filesystem: Filesystem, keep: int) -> CheckpointStore:
        return CheckpointStore(directory, self.guard, keep_last_n=keep, filesystem=filesystem, warn=lambda text: None)

    def record(self, earlier: list[int], new: int, keep: int, damage: str | None = None) -> tuple[Disk, list[Op]]:
        """The disk before, and the operations of, saving step `new` over the checkpoints `earlier`."""
        root = self.folder / "recorded"
        store = self.store(root / "checkpoints", Quick(), keep)
        root.mkdir()
        for step in earlier:
            store.save(step, *state(step), best=step == earlier[0], wait=True)
        if damage:
            path = root / "checkpoints" / damage
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        before = Disk.of(root)
        recorder = Recorder(root)
        assert self.store(root / "checkpoints", recorder, keep).wait()
        writer = self.store(root / "checkpoints", recorder, keep)
        writer.latest()
        writer.save(new, *state(new), best=True)
        assert writer.wait(), writer.last_error
        return before, recorder.ops

    def violation(self, before: Disk, ops: list[Op], allowed: set[State | None], new: int, keep: int) -> str | None:
        """The first crash that breaks the law: `latest` and `best` give one of `allowed`, and saving again works."""
        seen: set[str] = set()
        for files in crashes(before, ops):
            key = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
            if key in seen:
                continue
            seen.add(key)
            folder = self.folder / f"crash-{self.checked}"
            self.checked += 1
            build(files, folder)
            if broken := self.check(folder / "checkpoints", allowed, new, keep):
                return broken
        return None

    def check(self, directory: Path, allowed: set[State | None], new: int, keep: int) -> str | None:
        store = self.store(directory, Quick(), keep)
        found = restored(store.latest())
        if found not in allowed:
            return f"{directory}: latest is {found and found[0]}"
        best = restored(store.best())
        if best not in allowed:
            return f"{directory}: best is {best and best[0]}"
        if found is None:
            directory.parent.mkdir(exist_ok=True)
        step = new + 1 if found == of(new) else new  # the run goes on: it trains a lost step again
        store.save(step, *state(step), best=True)
        if not store.wait() or restored(store.latest()) != of(step):
            return f"{directory}: saving step {step} did not work"
        store.close()
        own = [path.name for path in directory.iterdir() if path.name.startswith(".tmp-old")]
        return f"{directory}: left {own}" if own else None


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Claim.acquire(tmp_path / "run") as claim:
        yield Bench(tmp_path, Guard.begin_attempt(tmp_path / "run", claim.generation))


def test_old_or_new_with_one_checkpoint_kept(bench: Bench) -> None:
    before, ops = bench.record([1], 2, keep=1)
    assert bench.violation(before, ops, {of(1), of(2)}, 2, keep=1) is None
    assert bench.checked >= 200


@pytest.mark.slow
def test_old_or_new_with_three_kept(bench: Bench) -> None:
    before, ops = bench.record([1, 2, 3], 4, keep=2)
    assert bench.violation(before, ops, {of(1), of(3), of(4)}, 4, keep=2) is None  # 1 is the old best
    assert bench.checked >= 200


def test_nothing_or_new_at_the_first_save(bench: Bench) -> None:
    before, ops = bench.record([], 1, keep=3)
    assert bench.violation(before, ops, {None, of(1)}, 1, keep=3) is None
    assert bench.checked >= 100


def test_replacing_a_damaged_step_never_loses_the_sound_one(bench: Bench) -> None:
    before, ops = bench.record([1, 2], 2, keep=3, damage="step-00000002/optimizer.safetensors")
    assert bench.violation(before, ops, {of(1), of(2)}, 2, keep=3) is None
    assert bench.checked >= 200


# ---- writers that break the law ----------------------------------------------------------------------------


def without_fsync(ops: list[Op]) -> list[Op]:
    return [op for op in ops if op.kind != "fsync"]


def without_fsync_of_directories(ops: list[Op]) -> list[Op]:
    return [op for op in ops if op.kind != "fsync_dir"]


def published_first(ops: list[Op]) -> list[Op]:
    """Writes into the final directory: named (and older ones rotated) before it is filled."""
    (publish,) = [op for op in ops if op.kind == "rename" and op.new.endswith("step-00000002")]
    start = next(index for index, op in enumerate(ops) if op.kind == "mkdir" and op.path == publish.path)
    rest = [op for op in ops[start + 1 :] if op is not publish]
    rotation = [op for op in rest if ".tmp-old-" in op.path + op.new]
    filling = [
        Op(op.kind, op.path.replace(publish.path, publish.new), op.new, op.file, op.data)
        for op in rest
        if op not in rotation
    ]
    return [*ops[: start + 1], publish, *rotation, *filling]


def manifest_first(ops: list[Op]) -> list[Op]:
    """Commits when the manifest is written, the payload after it."""
    (publish,) = [op for op in ops if op.kind == "rename" and op.new.endswith("step-00000002")]
    start = next(index for index, op in enumerate(ops) if op.kind == "mkdir" and op.path == publish.path)
    (number,) = [op.file for op in ops if op.kind == "create" and op.path.startswith(publish.path + "/manifest")]
    manifest = [op for op in ops if op.file == number]
    rest = [op for op in ops[start + 1 :] if op not in manifest and op is not publish]
    rotation = [op for op in rest if ".tmp-old-" in op.path + op.new]
    payload = [
        Op(op.kind, op.path.replace(publish.path, publish.new), op.new, op.file, op.data)
        for op in rest
        if op not in rotation
    ]
    return [*ops[: start + 1], *manifest, publish, *rotation, *payload]


def rotated_first(ops: list[Op]) -> list[Op]:
    rotation = [op for op in ops if ".tmp-old-" in op.path + op.new]
    return [*rotation, *(op for op in ops if op not in rotation)]


@pytest.mark.parametrize(
    "spoil",
    [without_fsync, without_fsync_of_directories, published_first, manifest_first, rotated_first],
    ids=lambda f: f.__name__,
)
def test_control_a_writer_in_another_order_breaks_the_law(bench: Bench, spoil: Any) -> None:
    before, ops = bench.record([1], 2, keep=1)
    # `best` moves to step 2 on commit, so nothing but the order protects step 1.
    assert bench.violation(before, spoil(ops), {of(1), of(2)}, 2, keep=1) is not None
