"""The record holds each (step, metric) once, exactly, whatever was torn or replayed."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.claim import Claim, Guard
from trainers.record import MetricsRecord, Row, last_row, read_rows, series


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    with Claim.acquire(tmp_path / "run") as claim:
        yield Guard.begin_attempt(tmp_path / "run", claim.generation)


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
    MetricsRecord(path, guard, resume_step=0).append(
        3, 192, "main", {"train/loss": math.nan, "a": math.inf, "b": -math.inf, "c": np.float32(0.1), "d": 7}, time_ms=5
    )
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
        MetricsRecord(folder / "m", Guard.begin_attempt(folder, claim.generation), resume_step=0).append(
            1, 1, "p", {"x": value}
        )
        read = rows(folder / "m")[0]["x"]
        assert np.float64(read).tobytes() == np.float64(value).tobytes() or (math.isnan(read) and math.isnan(value))
        again = MetricsRecord(folder / "m", Guard.begin_attempt(folder, claim.generation), resume_step=0)
        assert again.append(1, 1, "p", {"x": value}) == 0


def test_a_tail_torn_at_any_byte_is_dropped(tmp_path: Path, guard: Guard) -> None:
    whole = tmp_path / "whole"
    write(MetricsRecord(whole, guard, resume_step=0), range(1, 6))
    data = whole.read_bytes()
    kept = data[: data.rstrip(b"\n").rfind(b"\n") + 1]
    for cut in range(len(kept), len(data)):
        torn = tmp_path / "torn"
        torn.write_bytes(data[:cut])
        assert [row["step"] for row in rows(torn)] == [1, 2, 3, 4]
        record = MetricsRecord(torn, guard, resume_step=3)
        assert torn.read_bytes() == kept
        assert write(record, range(4, 8)) == 0
        record.close()
        assert [row["step"] for row in rows(torn)] == [1, 2, 3, 4, 5, 6, 7] and exactly_once(torn)
    torn.write_bytes(data)  # negative control: nothing torn, nothing dropped
    MetricsRecord(torn, guard, resume_step=3)
    assert torn.read_bytes() == data


@pytest.mark.parametrize("resume_step", [0, 5, 9, 10])
def test_an_exact_replay_writes_nothing(tmp_path: Path, guard: Guard, resume_step: int) -> None:
    path = tmp_path / "m"
    write(MetricsRecord(path, guard, resume_step=0), range(1, 11))
    before = path.read_bytes()
    again = MetricsRecord(path, guard, resume_step=resume_step)
    assert write(again, range(resume_step + 1, 11)) == 0 and again.incidents == []
    assert path.read_bytes() == before
    write(again, range(11, 13))
    assert [row["step"] for row in rows(path)] == list(range(1, 13)) and exactly_once(path)


def test_one_changed_bit_is_a_counted_incident_and_the_first_write_stands(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    write(MetricsRecord(path, guard, resume_step=0), range(1, 11))
    again = MetricsRecord(path, guard, resume_step=5)
    other = math.nextafter(loss(7), 1)
    assert write(again, range(6, 11), {7: other}) == 1
    (incident,) = again.incidents
    assert (incident.step, incident.name, incident.was, incident.now) == (7, "train/loss", loss(7), other)
    assert series(path, "resume/diverged") == [(7, 1)]
    assert dict(series(path, "train/loss")) == {step: loss(step) for step in range(1, 11)} and exactly_once(path)
    third = MetricsRecord(path, guard, resume_step=5)  # the incident itself is not written twice
    assert write(third, range(6, 11), {7: other}) == 1
    assert series(path, "resume/diverged") == [(7, 1)]


def test_tokens_and_phase_are_compared_and_zero_has_a_sign(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    MetricsRecord(path, guard, resume_step=0).append(1, 64, "main", {"x": 0.0})
    assert MetricsRecord(path, guard, resume_step=0).append(1, 64, "main", {"x": 0.0}) == 0
    assert MetricsRecord(path, guard, resume_step=0).append(1, 65, "main", {"x": 0.0}) == 1
    assert MetricsRecord(path, guard, resume_step=0).append(1, 64, "code", {"x": 0.0}) == 1
    assert MetricsRecord(path, guard, resume_step=0).append(1, 64, "main", {"x": -0.0}) == 1


def test_a_new_name_at_an_old_step_is_a_further_row(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    write(MetricsRecord(path, guard, resume_step=0), range(1, 11))
    again = MetricsRecord(path, guard, resume_step=4)
    assert again.append(8, 8 * 64, "main", {"train/loss": loss(8), "val/loss": 2.0}) == 0
    assert series(path, "val/loss") == [(8, 2.0)] and exactly_once(path)
    for name in ("train/loss", "val/loss"):  # twice within one life
        assert again.append(8, 8 * 64, "main", {name: 1.0}) == 1
    assert exactly_once(path)


def test_lines_that_are_no_rows_are_passed_over_with_a_warning(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    write(MetricsRecord(path, guard, resume_step=0), range(1, 4))
    path.write_bytes(b"\0" * 40 + b"\n[1]\n" + path.read_bytes() + b'{"step": "x"}\n')
    warnings: list[str] = []
    MetricsRecord(path, guard, resume_step=0, warn=warnings.append)
    assert len(warnings) == 3 and [row["step"] for row in rows(path)] == [1, 2, 3]


def test_offsets_let_a_reader_go_on(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    assert list(read_rows(path)) == [] and last_row(path) is None
    record = MetricsRecord(path, guard, resume_step=0)
    write(record, range(1, 4))
    *_, (_, offset) = read_rows(path)
    assert list(read_rows(path, offset=offset)) == []
    write(record, range(4, 6))
    assert [row["step"] for row, _ in read_rows(path, offset=offset)] == [4, 5]


def test_last_row_joins_the_rows_of_the_newest_step(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    record = MetricsRecord(path, guard, resume_step=0)
    write(record, range(1, 2000))
    record.append(2000, 1, "main", {"train/loss": 1.5})
    record.append(2000, 1, "main", {"val/loss": 2.5})
    last = last_row(path)
    assert last is not None and (last["step"], last["train/loss"], last["val/loss"]) == (2000, 1.5, 2.5)


def test_a_full_disk_delays_rows_and_loses_none(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "m"
    warnings: list[str] = []
    record = MetricsRecord(path, guard, resume_step=0, warn=warnings.append)
    write(record, range(1, 4))
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))  # a partial write, then none
        write(record, range(4, 8))
        assert [row["step"] for row in rows(path)] == [1, 2, 3] and path.read_bytes().endswith(b"\n")
        assert len(warnings) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    write(record, range(8, 9))
    record.sync()
    assert [row["step"] for row in rows(path)] == list(range(1, 9)) and exactly_once(path)
