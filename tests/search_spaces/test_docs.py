"""docs/search_spaces.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from search_spaces.catalog import catalog_lines
from search_spaces.check import GRID, check
from search_spaces.grammar import load_space, parse_assignment, parse_domain
from trainers.presets import preset

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "search_spaces.md").read_text(encoding="utf-8")


def test_the_table_is_the_catalog() -> None:
    rows = [f"| `{line.name}` | {line.searches.rstrip('.')} | {line.suits} |" for line in catalog_lines()]
    assert "\n".join(rows) in PAGE


def test_the_example_is_a_space_that_can_start() -> None:
    (example,) = re.findall(r"```yaml\n(.+?)```", PAGE, re.DOTALL)
    space = load_space(example)
    check(space, preset("fundamentallm/small"), "cpu")
    (condition,) = re.findall(r"`'(schedule\.decay_fraction=.+?)'`", PAGE)
    assert parse_assignment(condition) == space.axis("schedule.decay_fraction")


def test_the_command_lines_parse() -> None:
    axes = re.findall(r"--set-space '(.+?)'", PAGE)
    assert [parse_assignment(axis).path for axis in axes] == ["optim.lr", "batch.sequences"]


@pytest.mark.parametrize("text", re.findall(r"`((?:log|uniform|int|logint|choice)\(.+?\)|\[.+?\])`", PAGE))
def test_the_grammar_is_what_is_read(text: str) -> None:
    assert parse_domain(text).problems() == []


def test_the_limit_is_the_one_of_the_code() -> None:
    assert f"more than {GRID}" in PAGE
