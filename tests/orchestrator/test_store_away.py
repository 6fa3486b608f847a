"""A store that fails while training goes on: every row waits in the record, is owed openly, and arrives once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.tracking import Store, TrackingUnavailable, open_store
from tests.orchestrator.faults import history
from tests.orchestrator.store_server import Server
from tests.orchestrator.test_feeder import Record, feeding, open_run, wait_for

pytestmark = pytest.mark.usefixtures("no_store_named")


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "metrics.jsonl")


def test_a_server_that_answers_500_is_waited_for(server: Server, record: Record, tmp_path: Path) -> None:
    store, said = open_store(tmp_path), list[str]()
    run = open_run(store)
    record.append(1, 100)
    with feeding(record, run, said):
        wait_for(lambda: len(history(run, "train/loss")) == 100)
        server.failing = True
        record.append(101, 300)
        wait_for(lambda: bool(said))
        assert len(said) == 1 and "away" in said[0] and "500" in said[0]
        record.append(301, 400)
        server.failing = False
        wait_for(lambda: len(said) == 2)
        assert "back" in said[1]
    assert server.refused > 0
    assert history(run, "train/loss") == [(s, 1 / s) for s in range(1, 401)]


def test_what_a_failing_server_is_owed_at_the_end_is_said_and_sent_later(
    server: Server, record: Record, tmp_path: Path
) -> None:
    store, said = open_store(tmp_path), list[str]()
    run = open_run(store)
    record.append(1, 50)
    server.failing = True
    with feeding(record, run, said) as feeder:
        done = feeder.close(1.0)
    assert done.pending == 50 and "500" in str(done.problem)
    server.failing = False
    assert history(run, "train/loss") == []
    with feeding(record, run, said) as feeder:
        assert feeder.close(20).pending == 0
    assert history(run, "train/loss") == [(s, 1 / s) for s in range(1, 51)]


def test_a_database_that_became_read_only_is_waited_for(store: Store, record: Record) -> None:
    run, said = open_run(store), list[str]()
    with feeding(record, run, said):
        with read_only(store):
            record.append(1, 50)
            wait_for(lambda: bool(said))
            assert "readonly" in said[0]
            with pytest.raises(TrackingUnavailable, match="readonly"):
                run.log_metrics([{"step": 1, "time_ms": 1, "a": 1.0}])
            assert history(run, "train/loss") == []  # it can still be read
        wait_for(lambda: len(said) == 2)
    assert history(run, "train/loss") == [(s, 1 / s) for s in range(1, 51)]


@contextlib.contextmanager
def read_only(store: Store) -> Iterator[None]:
    """SQLite itself refuses to write, whoever runs the tests: permissions do not bind an administrator."""
    from sqlalchemy import event

    engine = store.client._tracking_client.store.engine

    def refuse(connection: Any, record: Any, proxy: Any) -> None:
        connection.execute(f"PRAGMA query_only = {'ON' if bound else 'OFF'}")

    bound = True
    event.listen(engine, "checkout", refuse)
    try:
        yield
    finally:
        bound = False
