"""The record holds each (step, metric) once, exactly, whatever was torn or replayed."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.checkpoint import CheckpointStore
from trainers.claim import Claim, Guard
from trainers.errors import Superseded
from trainers.record import MetricsRecord, last_row, read_rows, series
from trainers.row_writer import CADENCE_S, Row


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    with Claim.acquire(tmp_path / "run") as claim:
        yield Guard.begin_attempt(tmp_path / "run", claim.generation)


def opened(
    path: Path, guard: Guard, resume_step: int = 0, warn: Callable[[str], object] = print
) -> closing[MetricsRecord]:
    return closing(MetricsRecord(path, guard, resume_step=resume_step, warn=warn))


def appended(
    path: Path, guard: Guard, steps: range, change: dict[int, float] | None = None, *, resume_step: int = 0
) -> MetricsRecord:
    """The closed record of one life that logged `steps`."""
    with opened(path, guard, resume_step) as record:
        write(record, steps, change)
    return record


def loss(step: int) -> float:
    return math.sin(step) / 3


def write(record: MetricsRecord, steps: range, change: dict[int, float] | None = None) -> int:
    return sum(
        record.append(
            step,
            step * 64,
            "main",
            {"train/loss": (change or {}).get(step, loss(step)), "perf/step_s": os.urandom(1)[0]},
        )
        for step in steps
    )


def rows(path: Path) -> list[Row]:
    return [row for row, _ in read_rows(path)]


def exactly_once(path: Path) -> bool:
    seen = [
        (row["step"], name) for row in rows(path) for name in row if name not in ("step", "tokens", "time_ms", "phase")
    ]
    return len(seen) == len(set(seen))


def test_a_row_is_one_flat_strict_object(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = {"train/loss": math.nan, "a": math.inf, "b": -math.inf, "c": np.float32(0.1), "d": 7}
    with opened(path, guard) as record:
        record.append(3, 192, "main", metrics, time_ms=5)
    text = path.read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(row) == ["step", "tokens", "time_ms", "phase", "train/loss", "a", "b", "c", "d"]
    assert text.endswith("\n") and text.count("\n") == 1
    (read,) = rows(path)
    assert math.isnan(read["train/loss"]) and read["a"] == math.inf and read["b"] == -math.inf
    assert read["c"] == float(np.float32(0.1)) and read["d"] == 7 and read["time_ms"] == 5


@settings(max_examples=100, deadline=None)
@given(value=st.floats())
def test_values_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    folder = tmp_path_factory.mktemp("bits")
    with Claim.acquire(folder) as claim:
        guard = Guard.begin_attempt(folder, claim.generation)
        with opened(folder / "m", guard) as record:
            record.append(1, 1, "p", {"x": value})
        read = rows(folder / "m")[0]["x"]
        assert np.float64(read).tobytes() == np.float64(value).tobytes() or (math.isnan(read) and math.isnan(value))
        with opened(folder / "m", guard) as again:
            assert again.append(1, 1, "p", {"x": value}) == 0


def test_a_tail_torn_at_any_byte_is_dropped(tmp_path: Path, guard: Guard) -> None:
    whole = tmp_path / "whole"
    appended(whole, guard, range(1, 6))
    data = whole.read_bytes()
    kept = data[: data.rstrip(b"\n").rfind(b"\n") + 1]
    for cut in range(len(kept), len(data)):
        torn = tmp_path / "torn"
        torn.write_bytes(data[:cut])
        assert [row["step"] for row in rows(torn)] == [1, 2, 3, 4]
        with opened(torn, guard, resume_step=3) as record:
            assert torn.read_bytes() == kept
            assert write(record, range(4, 8)) == 0
        assert [row["step"] for row in rows(torn)] == [1, 2, 3, 4, 5, 6, 7] and exactly_once(torn)
    torn.write_bytes(data)  # negative control: nothing torn, nothing dropped
    appended(torn, guard, range(0), resume_step=3)
    assert torn.read_bytes() == data


@pytest.mark.parametrize("resume_step", [0, 5, 9, 10])
def test_an_exact_replay_writes_nothing(tmp_path: Path, guard: Guard, resume_step: int) -> None:
    path = tmp_path / "m"
    appended(path, guard, range(1, 11))
    before = path.read_bytes()
    again = appended(path, guard, range(resume_step + 1, 11), resume_step=resume_step)
    assert again.incidents == [] and again.diverged == 0
    assert path.read_bytes() == before
    appended(path, guard, range(11, 13), resume_step=10)
    assert [row["step"] for row in rows(path)] == list(range(1, 13)) and exactly_once(path)


def test_one_changed_bit_is_a_counted_incident_and_the_first_write_stands(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    appended(path, guard, range(1, 11))
    other = math.nextafter(loss(7), 1)
    with opened(path, guard, resume_step=5) as again:
        assert write(again, range(6, 11), {7: other}) == 1
    (incident,) = again.incidents
    assert (incident.step, incident.name, incident.was, incident.now) == (7, "train/loss", loss(7), other)
    assert series(path, "resume/diverged") == [(7, 1)]
    assert dict(series(path, "train/loss")) == {step: loss(step) for step in range(1, 11)} and exactly_once(path)
    third = appended(path, guard, range(6, 11), {7: other}, resume_step=5)
    assert third.diverged == 1  # and the incident itself is not written twice
    assert series(path, "resume/diverged") == [(7, 1)]


def test_tokens_and_phase_are_compared_and_zero_has_a_sign(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"

    def differing(tokens: int, phase: str, value: float) -> int:
        with opened(path, guard) as record:
            return record.append(1, tokens, phase, {"x": value})

    assert differing(64, "main", 0.0) == 0  # the first life
    assert differing(64, "main", 0.0) == 0
    assert differing(65, "main", 0.0) == 1
    assert differing(64, "code", 0.0) == 1
    assert differing(64, "main", -0.0) == 1


def test_a_new_name_at_an_old_step_is_a_further_row(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    appended(path, guard, range(1, 11))
    with opened(path, guard, resume_step=4) as again:
        assert again.append(8, 8 * 64, "main", {"train/loss": loss(8), "val/loss": 2.0}) == 0
        for name in ("train/loss", "val/loss"):  # twice within one life
            assert again.append(8, 8 * 64, "main", {name: 1.0}) == 1
    assert series(path, "val/loss") == [(8, 2.0)] and exactly_once(path)


def test_lines_that_are_no_rows_are_passed_over_with_a_warning(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    appended(path, guard, range(1, 4))
    path.write_bytes(b"\0" * 40 + b"\n[1]\n" + path.read_bytes() + b'{"step": "x"}\n')
    warnings: list[str] = []
    with opened(path, guard, warn=warnings.append):
        pass
    assert len(warnings) == 3 and [row["step"] for row in rows(path)] == [1, 2, 3]


def test_offsets_let_a_reader_go_on(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    assert list(read_rows(path)) == [] and last_row(path) is None
    appended(path, guard, range(1, 4))
    *_, (_, offset) = read_rows(path)
    assert list(read_rows(path, offset=offset)) == []
    appended(path, guard, range(4, 6), resume_step=3)
    assert [row["step"] for row, _ in read_rows(path, offset=offset)] == [4, 5]


def test_last_row_joins_the_rows_of_the_newest_step(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    with opened(path, guard) as record:
        write(record, range(1, 2000))
        record.append(2000, 1, "main", {"train/loss": 1.5})
        record.append(2000, 1, "main", {"val/loss": 2.5})
    last = last_row(path)
    assert last is not None and (last["step"], last["train/loss"], last["val/loss"]) == (2000, 1.5, 2.5)


@contextmanager
def room_for(n_bytes: int, path: Path) -> Iterator[None]:
    """A disk that lets `path` grow by so much and no more."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + n_bytes, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_delays_rows_and_loses_none(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    warnings: list[str] = []
    with opened(path, guard, warn=warnings.append) as record:
        write(record, range(1, 4))
        record.sync()
        with room_for(10, path):  # a partial write, then none
            for steps in (range(4, 6), range(6, 8)):
                write(record, steps)
                with pytest.raises(OSError):
                    record.sync()
                assert [row["step"] for row in rows(path)] == [1, 2, 3] and path.read_bytes().endswith(b"\n")
            assert len(warnings) == 1
        write(record, range(8, 9))
        record.sync()
        assert [row["step"] for row in rows(path)] == list(range(1, 9)) and exactly_once(path)
        assert len(warnings) == 1


def test_whole_rows_go_into_what_room_there_is(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    with opened(path, guard, warn=lambda text: None) as record:
        record.append(1, 64, "main", {"x": 1.0}, time_ms=1)
        record.sync()
        with room_for(2 * path.stat().st_size + 5, path):
            for step in range(2, 6):
                record.append(step, 64, "main", {"x": 1.0}, time_ms=1)
            with pytest.raises(OSError):
                record.sync()
            assert [row["step"] for row in rows(path)] == [1, 2, 3] and path.read_bytes().endswith(b"\n")
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5]


def test_rows_that_never_found_room_are_counted_at_the_end(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    warnings: list[str] = []
    with opened(path, guard, warn=warnings.append) as record:
        write(record, range(1, 2))
        record.sync()
        with room_for(10, path):
            write(record, range(2, 4))
            record.close()
    assert "the last 2 rows" in warnings[-1] and [row["step"] for row in rows(path)] == [1]


# ---- the writer behind it --------------------------------------------------------------------------------------


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_rows_arrive_in_order_without_being_asked_for(tmp_path: Path, guard: Guard) -> None:
    with opened(tmp_path / "m", guard) as record:
        write(record, range(1, 200))
        assert within(20, lambda: len(rows(tmp_path / "m")) == 199)
        assert [row["step"] for row in rows(tmp_path / "m")] == list(range(1, 200))


def test_appending_waits_for_nobody_and_sync_waits_for_the_rows(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    with opened(path, guard) as record:
        synced = threading.Thread(target=record.sync)
        with guard.held():  # somebody commits: nothing can be written
            write(record, range(1, 50))
            synced.start()
            synced.join(CADENCE_S * 3)
            assert synced.is_alive() and rows(path) == []
        synced.join()
        assert [row["step"] for row in rows(path)] == list(range(1, 50))


def test_closing_writes_what_has_come_and_a_second_time_does_nothing(tmp_path: Path, guard: Guard) -> None:
    record = appended(tmp_path / "m", guard, range(1, 5))
    assert [row["step"] for row in rows(tmp_path / "m")] == [1, 2, 3, 4]
    record.close()
    assert not any(thread.name == "rows" for thread in threading.enumerate())


def test_who_lost_the_run_is_told_at_the_next_call_and_writes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Claim.acquire(run) as claim:
        record = MetricsRecord(run / "m", Guard.begin_attempt(run, claim.generation), resume_step=0)
        write(record, range(1, 3))
        record.sync()
    with Claim.acquire(run):
        write(record, range(3, 4))  # the loss is not known here yet
        assert within(20, lambda: record._writer._failure is not None)
        for call in (lambda: write(record, range(4, 5)), record.sync, record.close):
            with pytest.raises(Superseded):
                call()
    assert [row["step"] for row in rows(run / "m")] == [1, 2]


def test_a_row_that_cannot_be_written_is_no_secret(tmp_path: Path, guard: Guard) -> None:
    record = MetricsRecord(tmp_path / "m", guard, resume_step=0)
    record._writer.put({"step": 1, "x": object()})
    with pytest.raises(TypeError):
        record.sync()
    with pytest.raises(TypeError):
        record.close()


@pytest.mark.parametrize("asks", [True, False])
def test_no_checkpoint_without_the_rows_up_to_it(tmp_path: Path, guard: Guard, asks: bool) -> None:
    run = tmp_path / "run"
    with opened(run / "m", guard, warn=lambda text: None) as record:
        before = record.sync if asks else lambda: None  # False: negative control
        store = CheckpointStore(run / "checkpoints", guard, before_commit=before, warn=lambda text: None)
        write(record, range(1, 200))
        store.save(199, {"model": {}}, {}, wait=True)
        assert (len(rows(run / "m")) == 199) is asks
        record.sync()
        with room_for(10, run / "m"):  # enough for all of the small files of a checkpoint
            write(record, range(200, 201))
            store.save(200, {"model": {}}, {}, wait=True)
            latest = store.latest()
            assert latest is not None and latest.step == (199 if asks else 200)
        store.save(200, {"model": {}}, {}, wait=True)
        latest = store.latest()
        assert latest is not None and latest.step == 200 and (len(rows(run / "m")) == 200) is asks
        store.close()


KILLED = """
import os, sys, signal
from pathlib import Path
from trainers.claim import Claim, Guard
from trainers.record import MetricsRecord
run_dir = Path(sys.argv[1])
claim = Claim.acquire(run_dir)
record = MetricsRecord(run_dir / "m", Guard.begin_attempt(run_dir, claim.generation), resume_step=0)
for step in range(1, 8):
    record.append(step, step * 64, "main", {"train/loss": step / 7})
    if step == 4:
        record.sync()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_kill_takes_is_after_the_last_sync_and_the_replay_brings_it_back(tmp_path: Path) -> None:
    path = tmp_path / "m"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    found = [row["step"] for row in rows(path)]
    assert found[:4] == [1, 2, 3, 4] and found == sorted(found)
    with Claim.acquire(tmp_path) as claim, opened(path, Guard.begin_attempt(tmp_path, claim.generation), 4) as record:
        for step in range(5, 8):
            assert record.append(step, step * 64, "main", {"train/loss": step / 7}) == 0
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5, 6, 7] and exactly_once(path)
