"""The grammar of domains: what it reads, that it reads back what it writes, and what it says to the rest."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import example, given

from search_spaces import grammar
from search_spaces.domains import Choice, Domain, Float, Int
from search_spaces.grammar import (
    dump_space,
    load_space,
    parse_assignment,
    parse_domain,
    spell_axis,
    spell_domain,
)
from search_spaces.space import Axis, Space, When
from tests.search_spaces import strategies
from trainers.errors import ConfigError


@given(strategies.domains)
@example(Choice((None, "-")))  # before a line's end a lone dash begins YAML's other kind of list
def test_what_is_spelled_reads_back(domain: Domain) -> None:
    assert parse_domain(spell_domain(domain)) == domain
    assert "\n" not in spell_domain(domain)


@given(strategies.spaces())
def test_a_space_survives_yaml(space: Space) -> None:
    assert load_space(dump_space(space)) == space


@given(strategies.spaces())
def test_an_axis_survives_the_command_line(space: Space) -> None:
    for axis in space.axes:
        assert parse_assignment(spell_axis(axis)) == axis


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("log(1e-5,1e-3)", Float(1e-5, 1e-3, log=True)),
        (" uniform ( 0 , 0.3 ) ", Float(0, 0.3)),
        ("int(2,8)", Int(2, 8)),
        ("int(0, 400, 50)", Int(0, 400, step=50)),
        ("logint(16,256)", Int(16, 256, log=True)),
        ("choice(8,16,32)", Choice((8, 16, 32))),
        ("[8,16,32]", Choice((8, 16, 32))),
        ("[1e-4, 1e-3]", Choice((1e-4, 1e-3))),
        ("choice(fp32, on, 'true', true, null)", Choice(("fp32", "on", "true", True, None))),
        ("[[0.9, 0.95], [0.9, 0.999]]", Choice(((0.9, 0.95), (0.9, 0.999)))),
        ("choice()", Choice(())),  # for `check` to refuse, with everything else
        ("log(1, 0)", Float(1, 0, log=True)),
    ],
)
def test_the_grammar(text: str, domain: Domain) -> None:
    assert parse_domain(text) == domain


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim.lr", "an axis is PATH=DOMAIN"),
        ("optim.lr=", "an axis is PATH=DOMAIN"),
        ("=log(1,2)", "an axis is PATH=DOMAIN"),
        ("optim.lr=0.1", "optim.lr: '0.1' is no domain but one value"),
        (f"optim.lr=uniform(0, 1{60 * chr(48)})", "a whole number of 61 digits is too large"),
        (f"optim.lr={300 * chr(40)}", "(300 characters)"),
        ("optim.lr=log(1e-5)", "log takes 2 numbers, got 1"),
        ("optim.lr=log(a, b)", "log takes 2 numbers, got 'a'"),
        ("optim.lr=log(true, 2)", "log takes 2 numbers, got True"),
        ("optim.lr=loguniform(1e-5, 1e-3)", "did you mean log(...)?"),
        ("optim.lr=uniforn(0, 1)", "did you mean uniform(...)?"),
        ("optim.lr=wat(0, 1)", "there is no wat(...)"),
        ("model.n_layers=int(1, 2.5)", "int takes 2 or 3 whole numbers, got 2.5"),
        ("model.n_layers=logint(1, 8, 2)", "logint takes 2 whole numbers, got 3"),
        ("optim.lr=log(1, 2", "bracket is not closed"),
        ("optim.lr=choice(a: [)", "must be a list"),
        ("optim.lr=log(1, 2) if a=b", "is no domain"),
    ],
)
def test_a_mistake_is_taught_the_grammar(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_assignment(text)
    assert said in str(caught.value)
    assert "log(LOW, HIGH)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_example_of_the_docstring_loads() -> None:
    example = textwrap.dedent((grammar.__doc__ or "").split("\n\n")[1])
    space = load_space(example)
    assert list(space)[-1] == "schedule.decay_fraction"
    assert space.axis("schedule.decay_fraction").when == When("schedule.kind", ("wsd",))
    assert space["optim.lr"] == Float(1e-5, 1e-3, log=True)


def test_conditions_on_the_command_line() -> None:
    one = parse_assignment("schedule.decay_fraction=uniform(.1,.5) when schedule.kind=wsd")
    several = parse_assignment("schedule.min_lr_ratio=uniform(0,.2) when schedule.kind = [wsd, linear]")
    assert one == Axis("schedule.decay_fraction", Float(0.1, 0.5), When("schedule.kind", ("wsd",)))
    assert several.when == When("schedule.kind", ("wsd", "linear"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is a mapping"),
        ("[1, 2]", "is a mapping"),
        ("a: 3", "a: 3 is no domain"),
        ("a: null", "is no domain"),
        ("a: {}", "a: has no domain"),
        ("a: {when: {b: 1}}", "a: has no domain"),
        ("{a: log(1, 2)}", "in quotes"),
        ("a: {domain: [1, 2], unless: {b: 1}}", "not unless"),
        ("a: {domain: [1, 2], when: wsd}", "one path with its value"),
        ("a: {domain: [1, 2], when: {b: 1, c: 2}}", "one path with its value"),
        ("a: [1, {b: 2}]", "a number, a word"),
        ("a: {b: [1, 2]}\na.b: [3, 4]", "a.b: given twice"),
        ("a: [1, 2]\na: [3, 4]", "duplicate key"),
    ],
)
def test_a_mistake_in_yaml_is_said_with_its_path(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_space(text)
    assert said in str(caught.value)
