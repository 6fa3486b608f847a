"""Laws of the feeder: every row of the record stands in the store once, and training never waits for it."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.feeder import Feeder, count_rows, read_position
from orchestrator.tracking import Store, TrackedRun, TrackingUnavailable
from tests.orchestrator.faults import history

pytestmark = pytest.mark.usefixtures("no_store_named")


def open_run(store: Store, name: str = "run", parent: str | None = None) -> TrackedRun:
    return store.open_run("laws", name, run_id=None, tags={}, params={}, parent_run_id=parent)


class Record:
    """A metrics.jsonl being written."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, first: int, last: int, phase: str = "main", key: str = "train/loss") -> None:
        with self.path.open("a") as record:
            for step in range(first, last + 1):
                now_ms = time.time_ns() // 10**6
                row = {"step": step, "tokens": 64 * step, "time_ms": now_ms, "phase": phase, key: 1 / step}
                record.write(json.dumps(row) + "\n")


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "metrics.jsonl")


@contextmanager
def feeding(
    record: Record, run: TrackedRun, said: list[str] | None = None, **phase_runs: TrackedRun
) -> Iterator[Feeder]:
    say: Callable[[str], None] = (said if said is not None else []).append
    feeder = Feeder(
        record.path, list(phase_runs) or ["main"], run, phase_runs, record.path.with_name("delivered.json"), say=say
    )
    feeder.start()
    yield feeder
    feeder.close(0)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def test_every_row_arrives_once_and_the_next_feeder_goes_on(store: Store, record: Record) -> None:
    run = open_run(store)
    with feeding(record, run) as feeder:  # the record does not exist yet
        record.append(1, 700)
        record.append(701, 900)
        done = feeder.close(20)
    assert (done.rows, done.pending, done.problem) == (900, 0, None)
    record.append(901, 1000)
    with feeding(record, run) as feeder:
        assert feeder.close(20).rows == 100
    assert history(run, "train/loss") == [(s, 1 / s) for s in range(1, 1001)]


def test_forgetting_what_was_delivered_duplicates_nothing(store: Store, record: Record) -> None:
    run = open_run(store)
    record.append(1, 300)
    for _ in range(2):
        with feeding(record, run) as feeder:
            assert feeder.close(20).rows == 300
        record.path.with_name("delivered.json").unlink()
    assert len(history(run, "train/loss")) == len(history(run, "tokens")) == 300


def test_an_evaluation_row_of_the_same_step_does_not_count_its_tokens_again(store: Store, record: Record) -> None:
    run = open_run(store)
    record.append(1, 10)
    time.sleep(0.002)  # another time_ms, which the store would take for another value
    record.append(10, 10, key="val/loss")
    with feeding(record, run) as feeder:
        feeder.close(20)
    assert history(run, "tokens") == [(s, 64 * s) for s in range(1, 11)]
    assert history(run, "val/loss") == [(10, 0.1)]


def test_the_parent_has_the_whole_curve_and_each_phase_its_slice(store: Store, record: Record) -> None:
    run = open_run(store)
    prose, code = (open_run(store, name, run.run_id) for name in ("prose", "code"))
    record.append(1, 20, "prose")
    record.append(21, 50, "code")
    with feeding(record, run, prose=prose, code=code) as feeder:
        assert feeder.close(20).rows == 50
    steps = {one.run_id: [s for s, _ in history(one, "train/loss")] for one in (run, prose, code)}
    assert steps == {
        run.run_id: list(range(1, 51)), prose.run_id: list(range(1, 21)), code.run_id: list(range(21, 51))
    }  # fmt: skip


def test_a_locked_store_costs_training_nothing_and_catches_up(store: Store, record: Record, tmp_path: Path) -> None:
    run, said = open_run(store), list[str]()
    impatient(store)
    record.append(1, 100)
    with feeding(record, run, said) as feeder:
        wait_for(lambda: read_position(tmp_path / "delivered.json", record.path, run.run_id).offset > 0)
        with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            record.append(101, 400)
            wait_for(lambda: bool(said))
            assert "locked" in said[0] and len(said) == 1
            unlucky = feeder.close(0.5)
            assert unlucky.pending == 300 and unlucky.problem is not None
            other.execute("ROLLBACK")
    with feeding(record, run, said) as feeder:
        assert feeder.close(20).pending == 0
    assert history(run, "train/loss") == [(s, 1 / s) for s in range(1, 401)]


def test_the_same_feeder_notices_that_the_store_is_back(store: Store, record: Record, tmp_path: Path) -> None:
    run, said = open_run(store), list[str]()
    impatient(store)
    with feeding(record, run, said):
        with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            record.append(1, 50)
            wait_for(lambda: bool(said))
            other.execute("ROLLBACK")
        wait_for(lambda: len(said) == 2)
        assert "back" in said[1]
    assert len(history(run, "train/loss")) == 50


def test_a_run_deleted_meanwhile_is_said_once_and_hurts_nobody(store: Store, record: Record) -> None:
    run, said = open_run(store), list[str]()
    store.client.delete_run(run.run_id)
    record.append(1, 5)
    with feeding(record, run, said) as feeder:
        done = feeder.close(20)
    assert done.pending == 5 and len(said) == 1 and "refuses" in said[0]


def test_a_torn_line_waits_and_another_record_starts_from_its_beginning(
    store: Store, record: Record, tmp_path: Path
) -> None:
    run = open_run(store)
    record.append(1, 3)
    with record.path.open("a") as handle:
        handle.write('{"step": 4, "time_ms": 1, "train/lo')
    with feeding(record, run) as feeder:
        done = feeder.close(20)
    assert (done.rows, done.pending) == (3, 0)
    with record.path.open("a") as handle:
        handle.write('ss": 0.25}\n')
    state = tmp_path / "delivered.json"
    position = read_position(state, record.path, run.run_id)
    assert count_rows(record.path, position.offset) == 1
    assert read_position(state, record.path, "another run").offset == 0
    record.path.write_text("x" * position.offset + "\n")
    assert read_position(state, record.path, run.run_id).offset == 0


def test_closing_keeps_to_its_time_and_counts_what_is_left(store: Store, record: Record) -> None:
    run = open_run(store)
    record.append(1, 20_000)
    with feeding(record, run) as feeder:
        done = feeder.close(0.3)
        wait_for(lambda: not feeder._thread.is_alive())
        assert feeder.close(0).rows == 20_000 - count_rows(record.path, feeder._position.offset)
    assert done.pending > 0 and "not enough" in str(done.problem)


def test_system_metrics_count_on_after_a_restart(
    store: Store, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    run = open_run(store)
    for _ in range(2):
        with feeding(record, run) as feeder:
            wait_for(lambda run=run: bool(history(run, "system/cpu_utilization_percentage")))  # type: ignore[misc]
            time.sleep(1.1)
            assert feeder.close(20).pending == 0
        before = [step for step, _ in history(run, "system/cpu_utilization_percentage")]
        assert before == list(range(len(before)))
        run = store.open_run("laws", "run", run_id=run.run_id, tags={}, params={})
        assert run.next_system_step == len(before)


def impatient(store: Store) -> None:
    """Make this store's connections give up on a lock at once, where MLflow waits 20 seconds."""
    from sqlalchemy import event

    engine = store.client._tracking_client.store.engine

    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def _no_waiting(connection, cursor, statement, *rest):  # type: ignore[no-untyped-def]
        return statement.replace("busy_timeout = 20000", "busy_timeout = 50"), rest[0]


def test_the_lock_in_these_tests_is_a_real_one(store: Store, tmp_path: Path) -> None:
    run = open_run(store)
    impatient(store)
    row = {"step": 1, "time_ms": 1, "a": 1.0}
    with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TrackingUnavailable, match="locked"):
            run.log_metrics([row])
        other.execute("ROLLBACK")
    run.log_metrics([row])
    assert history(run, "a") == [(1, 1.0)]
