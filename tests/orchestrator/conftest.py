"""What several tests share: a store of MLflow, a place where real runs happen, what an undisturbed run looks like."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.tracking import Store, open_store
from tests.orchestrator.faults import Place, undisturbed
from tests.orchestrator.store_server import Server, serving
from tests.orchestrator.sweep_episodes import SweepLeft, SweepPlace, undisturbed_sweep
from tests.trainers.crash import Ending


@pytest.fixture(scope="session")
def shared_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Starting Ray takes seconds, so one folder and its two undisturbed runs serve every test."""
    place = Place(tmp_path_factory.mktemp("place"))
    yield place
    place.close()


@pytest.fixture
def place(shared_place: Place) -> Iterator[Place]:
    """The shared place, left without a process, however the test ends."""
    yield shared_place
    shared_place.close()


@pytest.fixture(scope="session")
def one_worker(shared_place: Place) -> Ending:
    """What an undisturbed run with one worker leaves behind (`alone` in the place)."""
    return undisturbed(shared_place, "alone", 1)


@pytest.fixture(scope="session")
def two_workers(shared_place: Place) -> Ending:
    """The same with two (`pair`)."""
    return undisturbed(shared_place, "pair", 2)


@pytest.fixture(scope="session")
def shared_sweeps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SweepPlace]:
    """The same for sweeps."""
    place = SweepPlace(tmp_path_factory.mktemp("sweeps"))
    yield place
    place.close()


@pytest.fixture
def sweeps(shared_sweeps: SweepPlace) -> Iterator[SweepPlace]:
    """The shared place of sweeps, left without a process, however the test ends."""
    yield shared_sweeps
    shared_sweeps.close()


@pytest.fixture(scope="session")
def whole_sweep(shared_sweeps: SweepPlace) -> SweepLeft:
    """What an undisturbed random sweep of four trials leaves behind (`undisturbed` in the place of sweeps)."""
    return undisturbed_sweep(shared_sweeps)


@pytest.fixture
def no_store_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have a store, an experiment and a wish of their own."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_DEFAULT_ARTIFACT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty database: making one takes a second, copying it nothing."""
    runs = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("MLFLOW_TRACKING_URI", raising=False)
        open_store(runs)
    return runs / "mlflow.db"


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, no_store_named: None) -> Store:
    """An empty store in `tmp_path`."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return open_store(tmp_path)


@pytest.fixture
def server(
    empty_store: Path, tmp_path: Path, no_store_named: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """A tracking server over an empty store in `tmp_path`, named as the store; it can be told to fail."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(tmp_path / "mlartifacts"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    from mlflow.server import app, handlers

    monkeypatch.setattr(handlers, "_tracking_store", None)
    with serving(app.wsgi_app) as (server, address):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield server
