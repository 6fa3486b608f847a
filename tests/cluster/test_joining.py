"""Laws of a command that joins a cluster: its workers can be placed, and its token is the one Ray would find."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.ray_cluster import IN_A_JOB, _environment, ask_for_token, equal_share
from trainers.errors import UserError


def placed(free: list[int], workers: int, share: int) -> bool:
    """Whether that many workers of that many CPUs fit, put one after the other wherever there is room."""
    rooms = list(free)
    for _ in range(workers):
        room = next((index for index, cpus in enumerate(rooms) if cpus >= share), None)
        if room is None:
            return False
        rooms[room] -= share
    return True


@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(1, 12))
def test_the_share_is_the_largest_that_can_be_placed(free: list[int], workers: int) -> None:
    """Where even one CPU each is too much the caller has refused already."""
    if sum(free) < workers:
        return
    share = equal_share(free, workers)
    assert share >= 1 and placed(free, workers, share)
    assert not placed(free, workers, share + 1)


def test_an_equal_part_of_all_cpus_may_fit_nowhere() -> None:
    """The negative control: what a plain division gives on nodes of two sizes would wait for ever."""
    assert not placed([5, 1], 2, (5 + 1) // 2)
    assert equal_share([5, 1], 2) == 2


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and nothing of Ray in the environment, which is put back."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


def test_the_token_that_ray_would_find_comes_first(home: Path) -> None:
    ours = home / ".orchestrate" / "ray_token"
    assert ask_for_token(joining=True) == str(ours) == os.environ.pop("RAY_AUTH_TOKEN_PATH")
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert ours.stat().st_mode & 0o777 == 0o600
    rays = home / ".ray" / "auth_token"
    rays.parent.mkdir()
    rays.write_text("1")
    assert ask_for_token(joining=False) == str(ours), "a cluster of ours has our own token"
    del os.environ["RAY_AUTH_TOKEN_PATH"]
    assert ask_for_token(joining=True) == str(rays)
    named = home / "named"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(named)
    for content in (None, "", " \n"):
        if content is not None:
            named.write_text(content)
        with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH names"):
            ask_for_token(joining=True)
    named.write_text("2")
    assert ask_for_token(joining=True) == str(named)
    os.environ["RAY_AUTH_TOKEN"] = "3"
    assert ask_for_token(joining=True) == "RAY_AUTH_TOKEN"


def test_a_job_has_the_mode_and_the_token_of_its_cluster(home: Path) -> None:
    os.environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    os.environ[IN_A_JOB] = "{}"
    _environment(verbose=False)
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    del os.environ[IN_A_JOB]
    _environment(verbose=False)
    assert os.environ["RAY_AUTH_MODE"] == "token", "or else the first half would prove nothing"
