"""A place where real runs happen, shared by the tests that start Ray, and what an undisturbed run looks like."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.orchestrator.faults import Place, undisturbed
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
