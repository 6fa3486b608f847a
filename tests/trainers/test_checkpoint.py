"""A checkpoint gives back what was saved, or says that it cannot."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainers.checkpoint import NICENESS, CheckpointStore
from trainers.claim import Claim, Guard
from trainers.environment import environment, explain_difference
from trainers.errors import CheckpointError, Superseded, TrainingFailed
from trainers.filesystem import Filesystem
from trainers.manifest import MANIFEST, FileEntry, Manifest, part_stem, sound_checkpoints, step_name
from trainers.safetensors_io import DTYPES, file_size, raw_bytes, read_safetensors, write_safetensors
from trainers.snapshot import PIECE, SMALL, WORTH_HELP, SnapshotBuffer

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def claim(tmp_path: Path) -> Iterator[Claim]:
    with Claim.acquire(tmp_path / "run") as claim:
        yield claim


@pytest.fixture
def guard(claim: Claim) -> Guard:
    return Guard.begin_attempt(claim.run_dir, claim.generation)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


class Quick(Filesystem):
    """The real disk, without waiting for it."""

    def fsync(self, descriptor: int) -> None:
        pass

    def fsync_dir(self, path: Path) -> None:
        pass


def files(step: int) -> dict[str, Tensors]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {
            "w": torch.randn(8, 4, generator=generator),
            "tied.bias": torch.randn(3, generator=generator).bfloat16(),
        },
        "optimizer": {"w/exp_avg": torch.randn(8, 4, generator=generator), "w/step": torch.tensor(float(step))},
        "rank-00000": {"rng": torch.arange(16, dtype=torch.uint8) + step},
    }


def same(left: Tensors, right: Tensors) -> bool:
    """Bit for bit: names, dtypes, shapes, bytes."""
    return left.keys() == right.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and bytes(raw_bytes(a)) == bytes(raw_bytes(b))
        for a, b in ((left[name].contiguous(), right[name].contiguous()) for name in left)
    )


def holds(store: CheckpointStore, step: int) -> bool:
    found = store.latest()
    return found is not None and found.step == step and all(same(found.load(s), t) for s, t in files(step).items())


def standing(store: CheckpointStore) -> list[int]:
    """Steps of the checkpoints that can be used, oldest first."""
    return [checkpoint.step for checkpoint in sound_checkpoints(store.directory, verify=False)][::-1]


def saved(directory: Path, guard: Guard, *steps: int, **options: Any) -> CheckpointStore:
    store = CheckpointStore(directory, guard, **{"filesystem": Quick(), **options})
    for step in steps:
        store.save(step, files(step), {"step": step}, wait=True)
    return store


# ---- the format ------------------------------------------------------------------------------------------


def every_kind() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    kinds = {str(kind): torch.randint(0, 2, (3, 5), generator=generator).to(kind) for kind in DTYPES}
    extremes = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3e38])
    return kinds | {
        "zero-dim": torch.tensor(2.5),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "ä/extremes": extremes,
    }


def test_the_library_reads_what_we_write_bit_for_bit(tmp_path: Path) -> None:
    tensors = every_kind()
    size, digest = write_safetensors(Filesystem(), tmp_path / "x.safetensors", tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert len(data) == size == file_size(tensors) and FileEntry.of(data) == FileEntry(size, digest)
    assert (8 + int.from_bytes(data[:8], "little")) % 8 == 0
    assert same(load_file(tmp_path / "x.safetensors"), tensors) and same(
        read_safetensors(tmp_path / "x.safetensors"), tensors
    )
    other = tensors | {"zero-dim": torch.tensor(2.5000002)}  # negative control
    assert not same(load_file(tmp_path / "x.safetensors"), other)


def test_equal_states_make_equal_files(tmp_path: Path) -> None:
    tensors = every_kind()
    backwards = dict(reversed(tensors.items()))
    assert write_safetensors(Quick(), tmp_path / "a", tensors) == write_safetensors(Quick(), tmp_path / "b", backwards)


@pytest.mark.parametrize("length", [0, 7, 2**31, 2**63, 2**64 - 1])
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{" + b" " * 100)
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        read_safetensors(path)


# ---- what is saved is what comes back ------------------------------------------------------------------------


def test_a_round_trip_keeps_every_bit(directory: Path, guard: Guard) -> None:
    store = CheckpointStore(directory, guard)
    meta = {"best": float("inf"), "loss": float("nan"), "nested": [{"a": -float("inf")}, 0.1], "text": "ä"}
    store.save(300, {"model": every_kind(), "rank-00000": {}}, meta, wait=True)
    found = store.latest()
    assert found is not None and found.path == directory / "step-00000300" and found.stems == ("model", "rank-00000")
    assert same(found.load("model"), every_kind()) and found.load("rank-00000") == {}
    assert repr(found.meta) == repr(meta) and found.generation == guard.generation
    assert found.size_bytes == sum(p.stat().st_size for p in found.path.iterdir() if p.name != MANIFEST)
    assert (directory / "latest").read_text() == "step-00000300\n"
    json.loads((found.path / "state.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


class NoCopy(SnapshotBuffer[Any]):
    def copy(self, tensors: Any) -> Any:
        return dict(tensors)


class Slow(Quick):
    """A disk that is busy until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def write(self, descriptor: int, data: memoryview | bytes) -> int:
        self.go.wait(30)
        return super().write(descriptor, data)


@pytest.mark.parametrize("copies", [True, False])
def test_training_on_changes_nothing_that_is_being_saved(directory: Path, guard: Guard, copies: bool) -> None:
    disk = Slow()
    store = CheckpointStore(directory, guard, filesystem=disk)
    if not copies:  # negative control
        store._buffer = NoCopy()
    live = files(1)
    store.save(1, live, {"step": 1})
    for tensors in live.values():
        for tensor in tensors.values():
            tensor.add_(1)
    disk.go.set()
    assert store.wait()
    assert holds(store, 1) is copies


def test_the_snapshot_memory_is_reused_and_follows_a_new_layout() -> None:
    buffer: SnapshotBuffer[str] = SnapshotBuffer()
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in every_kind().items()}
    buffer.reserve(meta)
    reserved, arena = buffer.size_bytes, buffer._arena.data_ptr()
    for _ in range(2):
        assert same(buffer.copy(every_kind()), every_kind())
        assert (buffer.size_bytes, buffer._arena.data_ptr()) == (reserved, arena)
    transposed = {"t": torch.randn(6, 4).t(), "leaf": torch.randn(3, requires_grad=True)}
    assert same(buffer.copy(transposed), {name: tensor.detach().contiguous() for name, tensor in transposed.items()})
    larger = {"t": torch.randn(1000)}
    assert same(buffer.copy(larger), larger) and buffer.size_bytes > reserved


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_several_threads_copy_every_byte(threads: int) -> None:
    sizes = [1, SMALL, SMALL + 1, PIECE, PIECE + 1, 3 * PIECE - 1]
    assert sum(sizes) > WORTH_HELP
    buffer: SnapshotBuffer[int] = SnapshotBuffer()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            live = {n: torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in sizes}
            copies = buffer.copy(live)
            assert all(torch.equal(copies[n], live[n]) for n in sizes)
        live[PIECE + 1][-1] += 1  # negative control: they are copies, and the last byte counts
        assert not torch.equal(copies[PIECE + 1], live[PIECE + 1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="a thread's own priority")
def test_the_writer_stands_back_and_the_training_does_not(directory: Path, guard: Guard) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    store = CheckpointStore(directory, guard)
    assert store._writer.submit(os.getpriority, os.PRIO_PROCESS, 0).result() == min(own + NICENESS, 19)
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
    store.close()


def test_never_two_saves_in_flight(directory: Path, guard: Guard) -> None:
    disk = Slow()
    store = CheckpointStore(directory, guard, filesystem=disk)
    store.save(1, files(1), {})
    second = threading.Thread(target=store.save, args=(2, files(2), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and store._saves == 1
    disk.go.set()
    second.join()
    assert store.wait() and holds(store, 2)


# ---- damage (F6) -------------------------------------------------------------------------------------------


@pytest.fixture
def pair(directory: Path, guard: Guard) -> CheckpointStore:
    return saved(directory, guard, 1, 2)


@pytest.mark.parametrize("seed", range(120))
def test_any_damage_is_found_and_the_one_before_is_used(pair: CheckpointStore, directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = rng.choice(sorted((directory / "step-00000002").iterdir()))
    damage(path, rng)
    warnings: list[str] = []
    reader = CheckpointStore(directory, None, warn=warnings.append)
    assert holds(reader, 1)
    (warning,) = warnings
    assert "step-00000002" in warning and path.name in warning


def damage(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    match rng.choice(["flip", "flip", "cut", "grow", "delete", "link", "folder"]):
        case "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        case "cut":
            path.write_bytes(data[: rng.randrange(len(data))])
        case "grow":
            path.write_bytes(data + b" ")
        case "delete":
            path.unlink()
        case "link":  # the right bytes, but not ours
            path.rename(path.parent.parent / "elsewhere")
            path.symlink_to(path.parent.parent / "elsewhere")
        case "folder":
            path.unlink()
            path.mkdir()


def test_control_an_undamaged_pair_gives_the_newer_without_a_word(pair: CheckpointStore, directory: Path) -> None:
    warnings: list[str] = []
    assert holds(CheckpointStore(directory, None, warn=warnings.append), 2) and warnings == []


def test_a_flip_is_named_with_both_hashes_and_only_verifying_sees_it(pair: CheckpointStore, directory: Path) -> None:
    path = directory / "step-00000002" / "model.safetensors"
    was = FileEntry.of(path.read_bytes()).sha256
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    warnings: list[str] = []
    reader = CheckpointStore(directory, None, warn=warnings.append)
    assert holds(reader, 1)
    assert was in warnings[0] and FileEntry.of(path.read_bytes()).sha256 in warnings[0]
    unverified = reader.latest(verify=False)
    assert unverified is not None and unverified.step == 2


def test_saving_a_damaged_step_again_replaces_it_and_a_sound_one_stands(
    pair: CheckpointStore, directory: Path, guard: Guard
) -> None:
    path = directory / "step-00000002" / "model.safetensors"
    sound = path.stat().st_ino
    saved(directory, guard, 2)
    assert path.stat().st_ino == sound
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    store = saved(directory, guard, 2, warn=lambda text: None)
    assert path.stat().st_ino != sound and holds(store, 2)
    assert not list(directory.glob(".tmp-*"))


def test_damaged_ones_do_not_count_among_those_kept(directory: Path, guard: Guard) -> None:
    saved(directory, guard, 1, 2, 3)
    for step in (2, 3):
        (directory / step_name(step) / "state.json").write_text("{}")
    store = CheckpointStore(directory, guard, keep_last_n=2, filesystem=Quick(), warn=lambda text: None)
    assert holds(store, 1)
    store.save(2, files(2), {}, wait=True)
    assert standing(store) == [1, 2]


# ---- trouble with the disk (F8) --------------------------------------------------------------------------------


class Failing(Quick):
    """A disk that takes `budget` bytes and then refuses, with a partial write first."""

    def __init__(self, budget: int, number: int):
        self.budget = budget
        self.number = number

    def write(self, descriptor: int, data: memoryview | bytes) -> int:
        if self.budget <= 0:
            raise OSError(self.number, os.strerror(self.number))
        count = super().write(descriptor, memoryview(data)[: self.budget])
        self.budget -= count
        return count


def bytes_of_a_save(directory: Path, guard: Guard) -> int:
    counter = Failing(10**9, errno.EIO)
    saved(directory, guard, 1, filesystem=counter)
    return 10**9 - counter.budget


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("position", range(20))
def test_a_refused_write_leaves_the_run_alive_and_the_last_checkpoint_intact(
    tmp_path: Path, directory: Path, guard: Guard, position: int, number: int
) -> None:
    total = bytes_of_a_save(tmp_path / "counted", guard)
    saved(directory, guard, 1)
    warnings: list[str] = []
    disk = Failing(total * position // 20, number)
    store = CheckpointStore(directory, guard, filesystem=disk, warn=warnings.append)
    store.save(2, files(2), {"step": 2})
    assert store.wait() is False and store.last_error is not None
    assert len(warnings) == 1 and os.strerror(number) in warnings[0]
    assert "bytes and" in warnings[0] and "are free" in warnings[0]
    assert holds(store, 1) or holds(store, 2)  # the last bytes are the pointer's: by then the new one is committed
    assert len(list(directory.glob(".tmp-*"))) <= 1
    disk.budget = 10**9  # somebody made room
    store.save(3, files(3), {"step": 3}, wait=True)
    assert store.last_error is None and holds(store, 3) and not list(directory.glob(".tmp-*"))


def test_control_with_room_enough_nothing_is_refused(tmp_path: Path, directory: Path, guard: Guard) -> None:
    disk = Failing(bytes_of_a_save(tmp_path / "counted", guard), errno.ENOSPC)
    store = saved(directory, guard, 1, filesystem=disk)
    assert store.last_error is None and disk.budget == 0


def test_too_little_room_is_seen_before_a_byte_is_written(directory: Path, guard: Guard) -> None:
    class Small(Quick):
        def free_space(self, path: Path) -> int:
            return 100

    saved(directory, guard, 1)
    store = saved(directory, guard, 2, filesystem=Small(), warn=lambda text: None)
    assert "100 are free" in str(store.last_error) and "step-00000001 stands" in str(store.last_error)
    assert holds(store, 1) and not list(directory.glob(".tmp-*"))


def test_stop_ends_the_training_at_the_next_call(directory: Path, guard: Guard) -> None:
    store = CheckpointStore(directory, guard, on_disk_full="stop", filesystem=Failing(100, errno.ENOSPC))
    store.save(1, files(1), {})
    with pytest.raises(TrainingFailed, match="No space left"):
        store.save(2, files(2), {})
    with pytest.raises(TrainingFailed):
        store.save(3, files(3), {}, wait=True)


def test_a_mistake_of_ours_is_never_swallowed(directory: Path, guard: Guard) -> None:
    class Broken(Quick):
        def mkdir(self, path: Path) -> None:
            raise ZeroDivisionError

    store = CheckpointStore(directory, guard, filesystem=Broken())
    store.save(1, files(1), {})
    with pytest.raises(ZeroDivisionError):
        store.wait()


# ---- best, rotation, staging -----------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(directory: Path, guard: Guard) -> None:
    store = CheckpointStore(directory, guard, keep_last_n=2, filesystem=Quick())
    for step in range(1, 8):
        store.save(step, files(step), {}, best=step in (1, 3))
    assert store.wait()
    assert standing(store) == [3, 6, 7]
    best = store.best()
    assert best is not None and best.step == 3 and (directory / "best").read_text() == "step-00000003\n"
    other = CheckpointStore(directory, guard, keep_last_n=2, save_best=False, filesystem=Quick())
    other.save(8, files(8), {}, best=True, wait=True)
    assert standing(other) == [7, 8]


def test_best_outlives_a_crash_between_the_commit_and_its_pointer(directory: Path, guard: Guard) -> None:
    class Killed(Quick):
        def rename(self, old: Path, new: Path) -> None:
            if new.name in ("latest", "best"):
                raise KeyboardInterrupt
            super().rename(old, new)

    saved(directory, guard, 1)
    store = CheckpointStore(directory, guard, filesystem=Killed())
    store.save(2, files(2), {}, best=True)
    with pytest.raises(KeyboardInterrupt):
        store.wait()
    reader = CheckpointStore(directory, None)
    best = reader.best()
    assert best is not None and best.step == 2 and holds(reader, 2)


def test_a_step_already_saved_can_still_become_the_best(directory: Path, guard: Guard) -> None:
    for fresh in (False, True):  # in the same life, and in a later one
        store = CheckpointStore(directory, guard, filesystem=Quick())
        step = 5 + fresh
        store.save(step, files(step), {}, wait=True)
        if fresh:
            store = CheckpointStore(directory, guard, filesystem=Quick())
        store.save(step, files(step), {}, best=True, wait=True)
        best = store.best()
        assert best is not None and best.step == step


def test_only_the_staging_of_dead_attempts_is_pruned(directory: Path, claim: Claim) -> None:
    guard = Guard.begin_attempt(claim.run_dir, claim.generation)
    saved(directory, guard, 1)
    guard = Guard.begin_attempt(claim.run_dir, claim.generation)  # attempt 2 of generation 1
    stale = [".tmp-step-00000002-1.1.3", ".tmp-old-step-00000001-0.9.1", ".tmp-latest-1.1"]
    kept = [".tmp-step-00000002-1.2.1", ".tmp-step-00000002-2.1.1", ".tmp-mine", "notes"]
    for name in stale + kept:
        (directory / name).mkdir()
        (directory / name / "part").write_text("x")
    store = CheckpointStore(directory, guard, filesystem=Quick())
    store.prune_staging()
    names = {path.name for path in directory.iterdir()}
    assert names.isdisjoint(stale) and names >= set(kept) and holds(store, 1)


def test_foreign_names_and_links_are_not_checkpoints(directory: Path, guard: Guard, tmp_path: Path) -> None:
    store = saved(directory, guard, 1)
    shutil.copytree(directory / "step-00000001", tmp_path / "copy")
    (directory / "step-00000009").symlink_to(tmp_path / "copy")
    for name in ("step-9", "step-000000010", "step-00000010x", "step-0000001٣", "../step-00000011"):
        shutil.copytree(tmp_path / "copy", directory / name)
    (directory / "step-00000012").write_text("a file")
    assert standing(store) == [1] and holds(store, 1)
    shutil.copytree(tmp_path / "copy", directory / "step-00000013")  # sound bytes under another step's name
    assert holds(CheckpointStore(directory, None, warn=lambda text: None), 1)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".", "..", "", "x\0y", "-x", "a" * 200])
def test_a_manifest_cannot_name_a_file_elsewhere(directory: Path, guard: Guard, name: str) -> None:
    store = saved(directory, guard, 1)
    found = store.at(1)
    hostile = Manifest(1, 1, 1, 1, False, {**found.manifest.files, name: FileEntry(0, "0" * 64)})
    (found.path / MANIFEST).write_bytes(hostile.render())
    with pytest.raises(CheckpointError, match="which no checkpoint holds"):
        store.at(1)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"{}", b"[" * 100_000, b'{"format": ' + b"9" * 10_000 + b"}", b"\xff"]
)
def test_a_hostile_manifest_is_one_clear_error(directory: Path, guard: Guard, text: bytes) -> None:
    store = saved(directory, guard, 1)
    (store.at(1).path / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError):
        store.at(1)


def test_stems_are_checked(directory: Path, guard: Guard) -> None:
    store = saved(directory, guard, 1)
    with pytest.raises(CheckpointError, match="it holds model, optimizer, rank-00000"):
        store.at(1).load("../../secret")
    with pytest.raises(AssertionError):
        store.save(2, {"../x": {}}, {})


# ---- several ranks, several owners --------------------------------------------------------------------------------


def ranks(directory: Path, guard: Guard, world_size: int, **options: Any) -> list[CheckpointStore]:
    options = {"filesystem": Quick(), "warn": lambda text: None, "rank_timeout_s": 20, **options}
    return [
        CheckpointStore(directory, guard, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]


def share(step: int, rank: int) -> dict[str, Tensors]:
    own = {f"rank-{rank:05d}": {"rng": torch.full((4,), step * 10 + rank)}}
    return own if rank else {**{stem: tensors for stem, tensors in files(step).items() if stem != "rank-00000"}, **own}


def test_every_rank_writes_its_part_and_rank_0_commits(directory: Path, guard: Guard) -> None:
    stores = ranks(directory, guard, 3)
    for step in (1, 2):
        for store in reversed(stores):
            store.save(step, share(step, store._rank), {"step": step})
    for store in stores:
        assert store.wait()
    found = stores[0].latest()
    assert found is not None and found.step == 2 and found.world_size == 3
    assert found.stems == ("model", "optimizer", "rank-00000", "rank-00001", "rank-00002")
    assert all(same(found.load(f"rank-{rank:05d}"), share(2, rank)[f"rank-{rank:05d}"]) for rank in range(3))
    assert sorted(p.name for p in found.path.iterdir()) == sorted([*found.manifest.files, MANIFEST])
    assert not list(directory.glob(".tmp-*"))


@pytest.mark.parametrize("given", [3, 2], ids=["all parts", "one is missing"])
def test_what_the_ranks_write_in_slices_is_read_whole(directory: Path, guard: Guard, given: int) -> None:
    """7 rows are cut into 3, 3 and 1, two into one each and none; what is not cut is rank 0's."""
    whole = {"rows": torch.arange(21.0).reshape(7, 3), "few": torch.tensor([1, 2]), "count": torch.tensor(5.0)}
    stores = ranks(directory, guard, 3)
    for store in reversed(stores):
        rank = store._rank
        cut = {name: tensor.chunk(3)[rank : rank + 1] for name, tensor in whole.items() if tensor.dim()}
        mine = {name: slices[0] for name, slices in cut.items() if slices} | ({} if rank else {"count": whole["count"]})
        store.save(1, {part_stem("model", rank): mine} if rank < given else {}, {})
    assert all(store.wait() for store in stores)
    found = stores[0].latest()
    assert found is not None
    if given == 3:
        assert same(found.load("model"), whole)
        assert found.load("model-part-00002")["rows"].tolist() == [[18, 19, 20]]
    else:
        with pytest.raises(CheckpointError, match="holds no 'model'; it holds model-part-00000, model-part-00001"):
            found.load("model")


def test_a_rank_that_fails_or_is_silent_fails_the_save_and_not_the_next(directory: Path, guard: Guard) -> None:
    first, second = ranks(directory, guard, 2, rank_timeout_s=1)
    second._fs = Failing(0, errno.ENOSPC)
    for store in (first, second):
        store.save(1, share(1, store._rank), {})
    assert not first.wait() and not second.wait() and first.latest() is None
    first.save(2, share(2, 0), {})  # rank 1 does not come
    assert not first.wait() and "rank 1 did not write its part in time" in str(first.last_error)
    second._fs = Quick()
    second._saves = first._saves  # a real rank 1 was asked to save as often
    for store in (first, second):
        store.save(3, share(3, store._rank), {})
    assert first.wait() and second.wait()
    found = first.latest()
    assert found is not None and found.step == 3 and not list(directory.glob(".tmp-*"))


def test_closing_waits_for_no_dead_rank(directory: Path, guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.checkpoint.CLOSING_TIMEOUT_S", 0.1)
    first, _ = ranks(directory, guard, 2, rank_timeout_s=3600)
    first.save(1, share(1, 0), {})
    first.close()
    assert "the training ended before" in str(first.last_error) and not list(directory.iterdir())


def test_a_superseded_store_commits_nothing(directory: Path, claim: Claim) -> None:
    old_guard = Guard.begin_attempt(claim.run_dir, claim.generation)
    disk = Slow()
    old = CheckpointStore(directory, old_guard, filesystem=disk)
    old.save(1, files(1), {})
    new = CheckpointStore(directory, Guard.begin_attempt(claim.run_dir, claim.generation), filesystem=Quick())
    disk.go.set()
    with pytest.raises(Superseded):
        old.wait()
    with pytest.raises(Superseded):
        old.save(2, files(2), {}, wait=True)
    assert new.latest() is None and not list(directory.glob("step-*"))
    new.save(1, files(1), {}, wait=True)  # negative control: the owner's does
    assert holds(new, 1)


def test_what_must_be_durable_first_is(directory: Path, guard: Guard) -> None:
    seen: list[bool] = []
    store = CheckpointStore(
        directory, guard, filesystem=Quick(), before_commit=lambda: seen.append((directory / "step-00000001").exists())
    )
    store.save(1, files(1), {}, wait=True)
    assert seen == [False] and holds(store, 1)


# ---- the environment -------------------------------------------------------------------------------------------------


def test_a_change_that_may_change_the_bits_is_said_and_no_change_is_not() -> None:
    now = environment("cpu", 1, False)
    assert all(isinstance(value, str) for value in now.values()) and explain_difference(now, dict(now)) == []
    (sentence,) = explain_difference({**now, "threads": "64"}, now)
    assert "threads was 64 and is now" in sentence and "rounds differently" in sentence
    assert len(explain_difference(now, environment("cpu", 2, True))) == 2
