"""Spaces: points, conditions, and the way to JSON and back."""

from __future__ import annotations

import json
from itertools import islice
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.space import Axis, Choice, Float, Int, Space, When
from tests.search_spaces import strategies
from trainers.errors import ConfigError

WSD = Space(
    (
        Axis("schedule.kind", Choice(("cosine", "wsd"))),
        Axis("schedule.decay_fraction", Float(0.1, 0.5), When("schedule.kind", ("wsd",))),
        Axis("optim.lr", Float(1e-4, 1e-2, log=True)),
    )
)


@given(strategies.spaces(), st.integers())
def test_what_is_drawn_is_a_point(space: Space, seed: int) -> None:
    point = space.sample(Random(seed))
    assert space.holds(point)
    assert json.loads(json.dumps(point)) == point
    missing = dict(list(point.items())[1:])
    assert not space.holds(missing)  # the negative controls: an axis left out, one too many
    assert not space.holds(point | {"part.other": 1})


@given(strategies.spaces(), st.integers())
def test_a_draw_is_a_function_of_the_seed(space: Space, seed: int) -> None:
    first, again = Random(seed), Random(seed)
    assert [space.sample(first) for _ in range(3)] == [space.sample(again) for _ in range(3)]


def test_another_seed_draws_another_point() -> None:
    assert len({json.dumps(WSD.sample(Random(seed))) for seed in range(50)}) == 50


@given(strategies.spaces(), st.integers(1, 3))
def test_a_grid_is_made_of_points_each_once_in_one_order(space: Space, points: int) -> None:
    grid = list(islice(space.grid(points), 200))
    assert all(space.holds(point) for point in grid)
    assert len({json.dumps(point) for point in grid}) == len(grid)
    assert grid == list(islice(Space.from_json(space.to_json()).grid(points), 200))


@given(strategies.spaces())
def test_json_keeps_a_space(space: Space) -> None:
    assert Space.from_json(json.loads(json.dumps(space.to_json()))) == space
    shorter = Space(space.axes[1:])
    assert Space.from_json(shorter.to_json()) != space


def test_a_condition_is_honoured() -> None:
    grid = list(WSD.grid(2))
    assert len(grid) == 2 + 2 * 2
    assert all(("schedule.decay_fraction" in point) == (point["schedule.kind"] == "wsd") for point in grid)
    drawn = [WSD.sample(Random(seed)) for seed in range(50)]
    assert {len(point) for point in drawn} == {2, 3}
    assert all(("schedule.decay_fraction" in point) == (point["schedule.kind"] == "wsd") for point in drawn)
    assert not WSD.holds({"schedule.kind": "cosine", "schedule.decay_fraction": 0.2, "optim.lr": 1e-3})


def test_conditions_chain() -> None:
    space = Space(
        (
            Axis("a", Choice((0, 1))),
            Axis("b", Choice((0, 1)), When("a", (1,))),
            Axis("c", Int(1, 2), When("b", (0, 1))),
        )
    )
    assert list(space.grid(2)) == [{"a": 0}, *({"a": 1, "b": b, "c": c} for b in (0, 1) for c in (1, 2))]


def test_a_space_is_a_mapping_in_order() -> None:
    assert list(WSD) == ["schedule.kind", "schedule.decay_fraction", "optim.lr"]
    assert WSD["optim.lr"] == Float(1e-4, 1e-2, log=True)
    assert "optim.betas" not in WSD
    assert WSD.describe() == {
        "schedule.kind": "one of cosine, wsd",
        "schedule.decay_fraction": "0.1 .. 0.5 when schedule.kind is wsd",
        "optim.lr": "log 0.0001 .. 0.01",
    }
    assert Space(WSD.axes[::-1]) != WSD


def test_an_axis_takes_the_place_of_its_path_or_the_end() -> None:
    narrow, more = Axis("schedule.kind", Choice(("linear", "wsd"))), Axis("optim.eps", Float(1e-9, 1e-6, log=True))
    assert list(WSD.with_axis(narrow)) == list(WSD)
    assert WSD.with_axis(narrow)["schedule.kind"] == narrow.domain
    assert list(WSD.with_axis(more)) == [*WSD, "optim.eps"]


def test_bad_spaces_are_refused() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        Space((WSD.axes[0], WSD.axes[0]))
    with pytest.raises(ConfigError, match="at least 1 point"):
        WSD.grid(0)


@pytest.mark.parametrize(
    "data",
    [
        None, {}, [{}], [{"path": "a"}], [{"path": "a", "domain": {"kind": "int", "low": 1, "high": 2.5}}],
        [{"path": "a", "domain": {"kind": "odd"}}],
        [{"path": 1, "domain": {"kind": "choice", "options": [1]}}],
        [{"path": "a", "domain": {"kind": "choice", "options": [1], "more": 1}}],
    ],
)  # fmt: skip
def test_json_of_something_else_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="no search space"):
        Space.from_json(data)
