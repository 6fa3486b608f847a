"""Ranges and choices: what they contain, draw and grid."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.domains import Choice, Domain, Float, Int, same
from tests.search_spaces import strategies


@given(strategies.domains, st.integers())
def test_what_is_drawn_is_contained_and_json(domain: Domain, seed: int) -> None:
    assert domain.problems() == []
    rng = Random(seed)
    for _ in range(5):
        value = domain.sample(rng)
        assert domain.contains(value)
        assert json.loads(json.dumps(value)) == value


@given(strategies.domains, st.integers(1, 9))
def test_a_grid_is_contained_without_duplicates(domain: Domain, points: int) -> None:
    grid = domain.grid(points)
    assert all(domain.contains(value) for value in grid)
    assert not any(same(one, other) for i, one in enumerate(grid) for other in grid[:i])
    assert 1 <= len(grid) <= (len(domain.options) if isinstance(domain, Choice) else points)


@given(st.one_of(strategies.floats(), strategies.ints()), st.integers(2, 9))
def test_the_grid_of_a_range_rises_from_end_to_end(domain: Float | Int, points: int) -> None:
    grid = domain.grid(points)
    assert list(grid) == sorted(grid)
    last = domain.low + (domain.high - domain.low) // domain.step * domain.step if isinstance(domain, Int) else None
    assert (grid[0], grid[-1]) == (domain.low, domain.high if last is None else last)


@given(st.one_of(strategies.floats(), strategies.ints()))
def test_nothing_outside_is_contained(domain: Float | Int) -> None:
    """The negative control of `contains`."""
    for value in (domain.low - 1, domain.high + 1, math.nan, math.inf, True, None, "1", [1]):
        assert not domain.contains(value)
    if isinstance(domain, Int):
        assert not domain.contains(domain.low + 0.5)
        assert domain.step == 1 or not domain.contains(domain.low + 1)


def test_grids_are_even_in_their_own_scale() -> None:
    assert Float(1e-5, 1e-3, log=True).grid(3) == (1e-5, 1e-4, 1e-3)
    assert Float(0, 0.3).grid(4) == (0, 0.1, 0.2, 0.3)
    assert Float(1, 3).grid(1) == (2,)
    assert Int(16, 256, log=True).grid(5) == (16, 32, 64, 128, 256)
    assert Int(2, 8).grid(3) == (2, 5, 8)
    assert Int(0, 100, step=30).grid(9) == (0, 30, 60, 90)
    assert Choice((8, 16, 32)).grid(1) == (8, 16, 32)


@pytest.mark.parametrize("make", [lambda log: Float(1e-4, 1e-2, log), lambda log: Int(1, 10_000, log)])
def test_a_logarithmic_range_is_even_in_the_logarithm(make: Any) -> None:
    def below_the_middle(log: bool) -> float:
        domain, rng = make(log), Random(0)
        middle = math.sqrt(domain.low * domain.high)
        return sum(domain.sample(rng) < middle for _ in range(2000)) / 2000

    assert below_the_middle(log=True) == pytest.approx(0.5, abs=0.06)
    assert below_the_middle(log=False) < 0.2  # the negative control


def test_every_value_of_a_short_range_is_drawn() -> None:
    rng = Random(1)
    for domain in (Int(1, 4, log=True), Int(2, 8, step=3), Choice((True, 1, "1"))):
        drawn = {json.dumps(domain.sample(rng)) for _ in range(200)}
        assert drawn == {json.dumps(value) for value in domain.grid(4)}


@pytest.mark.parametrize(
    ("domain", "said"),
    [
        (Float(2, 1), "low (2.0) is above high (1.0)"),
        (Int(3, 3), "low and high are both 3"),
        (Float(0, 1, log=True), "must start above 0"),
        (Float(-1, 1, log=True), "must start above 0"),
        (Int(0, 8, log=True), "must start above 0"),
        (Float(0, math.inf), "finite"),
        (Float(math.nan, 1), "finite"),
        (Int(1, 8, step=0), "at least 1"),
        (Int(1, 8, step=9), "larger than the range"),
        (Int(1, 8, log=True, step=2), "has no step"),
        (Choice(()), "nothing to choose from"),
        (Choice((8,)), "a choice of one value"),
        (Choice((1, 2, 1.0)), "twice"),
        (Choice(([1, 2], (1, 2))), "twice"),
        (Choice((math.nan, 1)), "no number"),
    ],
)
def test_a_broken_domain_says_so(domain: Domain, said: str) -> None:
    (problem,) = domain.problems()
    assert said in problem


def test_values_are_the_same_when_a_configuration_cannot_tell_them_apart() -> None:
    assert same(1, 1.0) and same((1, 2), [1, 2]) and same("a", "a") and same(None, None)
    assert not same(1, True) and not same(0, False) and not same([1], [True]) and not same([1], 1)
    assert not same(None, 0) and not same([1], [1, 1])
    assert Choice((True, 1)).problems() == []


def test_the_values_given_out_are_new_each_time() -> None:
    choice = Choice(([0.9, 0.95], [0.9, 0.999]))
    choice.sample(Random(0)).append(1)
    choice.values[0].append(1)
    assert choice.values == [[0.9, 0.95], [0.9, 0.999]]
