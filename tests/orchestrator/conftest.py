"""A place where real runs happen, shared by the tests that start Ray, and what an undisturbed run looks like."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.orchestrator.faults import Place, assert_told_once, left
from tests.trainers.crash import Ending


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Starting Ray takes seconds, so one folder and its two undisturbed runs serve every test."""
    place = Place(tmp_path_factory.mktemp("place"))
    try:
        yield place
    finally:
        place.close()


@pytest.fixture(scope="session")
def one_worker(place: Place) -> Ending:
    """What an undisturbed run with one worker leaves behind (`alone` in the place)."""
    place.run("alone").expect(0)
    assert_told_once(place.runs, place.runs / "alone")
    return left(place.runs / "alone")


@pytest.fixture(scope="session")
def two_workers(place: Place) -> Ending:
    """The same with two (`pair`)."""
    place.run("pair", "--workers", "2").expect(0)
    assert_told_once(place.runs, place.runs / "pair")
    return left(place.runs / "pair")
