"""YAML, overrides and the fingerprint of a RunConfig."""

from __future__ import annotations

import json
import math
import re
import typing
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from trainers.config import Frozen, PhaseConfig, RunConfig, ScheduleConfig
from trainers.config_io import (
    build_config,
    differences,
    dump_yaml,
    fingerprint,
    fingerprint_fields,
    load_yaml,
    override,
)
from trainers.config_paths import ALIASES, element_types, leaf_paths, section_of
from trainers.errors import ConfigError
from trainers.presets import PRESETS, preset

TWO = preset("fundamentallm/two-phase")
SMALL = preset("fundamentallm/small")


# ---- YAML ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-1.5e+3", -1500.0), ("1.0e-08", 1e-8),
        ("012", 12), ("0o14", 12), ("0x1F", 31), ("+500", 500), ("-3", -3),
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("no", "no"), ("y", "y"),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("Null", None),
        ("12:30", "12:30"), ("2020-01-01", "2020-01-01"), ("0b1", "0b1"), ("1_000", "1_000"), ("=", "="),
        ("'1e-4'", "1e-4"), ("!!str 5", "5"), (".inf", math.inf), ("[0.9, .95]", [0.9, 0.95]),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    read = load_yaml(f"key: {text}")["key"]
    assert read == value
    assert type(read) is type(value)


def test_the_traps_are_real() -> None:
    """The negative control: PyYAML alone falls into each."""
    assert yaml.safe_load("[1e-4, on, 012, 12:30]") == ["1e-4", True, 10, 750]
    assert yaml.safe_load("a: 1\na: 2") == {"a": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "line 3.*duplicate key 'a'; it stands on line 1"),
        ("a: {b: 1, b: 2}", "duplicate key 'b'"),
        ("", "empty"),
        ("# only a comment", "empty"),
        ("- 1", "not a list"),
        ("just words", "not a text"),
        ("a: &x [*x]", "refers to itself"),
        ("\n".join(["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30)]), "aliases"),
        ("[" * 100_000, "nested deeper"),
        ("a: " + "[" * 50 + "]" * 50, "nested deeper"),
        ("a: " + "9" * 5000, "5000 digits"),
        ("a: !!python/object/apply:os.getcwd []", "tag"),
        ("a: !!binary aGk=", "tag"),
        ("1: 2", "key must be text"),
        ("? [1]\n: 2", "key must be text"),
        ("a: \0", r"U\+0000"),
        ("a: [1, 2", "line 1"),
        ("a: *b", "undefined alias"),
        ("--- 1\n--- 2", "line 2"),
        ("a: !!int x", "not a whole number"),
        ("x: " + "y" * 300_000, "characters"),
    ],
)
def test_bad_yaml_is_one_line_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        load_yaml(text)
    assert "\n" not in str(refusal.value)


def test_small_aliases_and_merges_are_welcome() -> None:
    assert load_yaml("a: &d {p: 1, q: 2}\nb: {<<: *d, q: 3}")["b"] == {"p": 1, "q": 3}


NASTY = [
    "1e4",
    "on",
    "null",
    "012",
    " x ",
    "a: b",
    "#c",
    "naïve \u2028",
    "\ud800",
    "''",
    "",
    "- x",
    "1:30",
    "=",
    "<<",
    "é" * 200,
]


@given(st.text() | st.sampled_from(NASTY), st.floats(min_value=5e-324, allow_infinity=False))
@example("x", 1e-08)
@example("x", 1e16)
def test_text_and_floats_round_trip_bit_for_bit(text: str, rate: float) -> None:
    optim = SMALL.optim.model_copy(update={"lr": rate})
    config = SMALL.model_copy(update={"preset": text, "optim": optim})
    again = build_config(load_yaml(dump_yaml(config)))
    assert again == config
    assert again.optim.lr.hex() == rate.hex()


def test_other_readers_see_the_same_floats() -> None:
    assert yaml.safe_load(dump_yaml(SMALL))["optim"]["eps"] == 1e-8


@given(st.data())
def test_damaged_yaml_is_refused_or_valid(data: st.DataObject) -> None:
    lines = dump_yaml(preset(data.draw(st.sampled_from(list(PRESETS))))).splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        line = data.draw(st.sampled_from(lines) | st.text(max_size=12) | st.just(lines[at] + ": 1") | st.just(""))
        lines[at] = line if data.draw(st.booleans()) else lines[at][:-1] + data.draw(st.sampled_from("0-e.[:{&*!\t'"))
    try:
        config = build_config(load_yaml("\n".join(lines)))
    except ConfigError as refusal:
        assert str(refusal)
    else:
        assert build_config(load_yaml(dump_yaml(config))) == config


# ---- messages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"optim": {"lrr": 1}}, r"optim\.lrr: unknown key; did you mean `optim\.lr`\?"),
        ({"learning_rate": 1}, r"did you mean `optim\.lr`\?"),
        ({"optim": {"learning_rate": 1}}, r"did you mean `optim\.lr`\?"),
        ({"batch_size": 1}, r"did you mean `batch\.sequences`\?"),
        ({"epochs": 1}, r"did you mean `budget\.epochs`\?"),
        ({"dropout": 0.5}, r"did you mean `model\.dropout`\?"),
        ({"modle": {}}, r"did you mean `model`\?"),
        ({"phases": [{"name": "code", "optim": {"learning_rate": 1}}]}, r"`phases\.code\.optim\.lr`"),
        ({"zzzzz": 1}, "known here: preset, seed"),
        ({"optim": 3}, r"optim: must be a mapping"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr: must be a valid number.*got 'fast'"),
        ({"optim": {"name": "adamm"}}, r"optim\.name: must be 'adamw', .* got 'adamm'"),
        ({"data": {"sources": [{"corpus": 5}]}}, r"data\.sources\.0\.corpus: must be text, got 5; put it in quotes\."),
        ({"data": {"sources": [{}]}}, r"data\.sources\.0\.corpus: required"),
        ({"phases": [{"name": "a", "budget": {"steps": 1, "epochs": 1}}]}, r"^phases\.a\.budget: set exactly one"),
        ({1: 2}, "1"),
    ],
)
def test_a_problem_is_one_line_with_path_and_way_out(data: dict[Any, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        build_config(data)
    assert "\n" not in str(refusal.value)


def test_each_problem_has_its_line() -> None:
    with pytest.raises(ConfigError) as refusal:
        build_config({"optim": {"lr": -1, "lrr": 1}, "seed": "x"})
    assert len(str(refusal.value).splitlines()) == 3


def test_every_alias_leads_somewhere() -> None:
    known = set(leaf_paths())
    assert set(ALIASES.values()) <= known
    assert "optim.learning_rate" not in known


# ---- overrides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("budget.tokens=1e6", "budget.tokens", 1_000_000),
        ("optim.clip_norm=null", "optim.clip_norm", None),
        ("optim.betas=[0.8,.95]", "optim.betas.0", 0.8),
        ("optim.betas.0=.8", "optim.betas.0", 0.8),
        ("deterministic=true", "deterministic", True),
        ("data.sources.0.revision=0123456", "data.sources.0.revision", "0123456"),
        ("data.sources.0.revision=1e5", "data.sources.0.revision", "1e5"),
        ("data.sources.0.text_field=a: b=c # d", "data.sources.0.text_field", "a: b=c # d"),
        ("model.d_ff=100", "model.d_ff", 100),
    ],
)
def test_an_override_sets_one_value(assignment: str, path: str, value: Any) -> None:
    read = fingerprint_fields(override(SMALL, [assignment]), ())[path]
    assert (read, type(read)) == (value, type(value))
    assert fingerprint_fields(SMALL, ())[path] != value


def test_setting_one_of_a_group_clears_the_others() -> None:
    config = override(SMALL, ["budget.steps=300", "batch.tokens=512", "evaluation.every_steps=5"])
    assert config.budget is not None
    assert (config.budget.steps, config.budget.epochs) == (300, None)
    assert (config.batch.tokens, config.batch.sequences) == (512, None)
    assert (config.evaluation.every_steps, config.evaluation.every_epochs) == (5, None)
    with pytest.raises(ConfigError, match="exclude each other"):
        override(SMALL, ["budget.steps=300", "budget.tokens=512"])
    with pytest.raises(ConfigError, match="set exactly one"):
        override(SMALL, ["budget={steps: 300, tokens: 512}"])


def test_the_last_assignment_of_a_path_holds() -> None:
    assert override(SMALL, ["seed=1", "seed=2"]).seed == 2


def test_a_phase_is_found_by_name_and_by_index() -> None:
    named, counted = (override(TWO, [f"phases.{key}.budget.steps=50"]) for key in ("code", "1"))
    assert named == counted
    assert [phase.budget.steps for phase in named.resolved_phases()] == [800, 50]


def test_a_path_into_what_a_phase_inherits_starts_from_the_run() -> None:
    orders = [["phases.prose.optim.lr=1", "optim.eps=0.5"], ["optim.eps=0.5", "phases.prose.optim.lr=1"]]
    for assignments in orders:
        prose = override(TWO, assignments).phases[0]
        assert prose.optim == SMALL.optim.model_copy(update={"lr": 1.0, "eps": 0.5})


def test_phases_that_all_get_budgets_release_the_runs() -> None:
    split = override(SMALL, ["phases=[{name: a}, {name: v1.5}]"])
    both = override(split, ["phases.a.budget.steps=1", "phases.v1.5.budget.steps=2"])
    assert (both.budget, [phase.budget.steps for phase in both.resolved_phases()]) == (None, [1, 2])
    assert override(split, ["phases.a.budget.steps=1"]).budget == SMALL.budget


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("budget.steps", "path=value"),
        ("=3", "path=value"),
        ("seed=", "null to clear"),
        ("optim.lrr=1", r"did you mean `optim\.lr`"),
        ("learning_rate=1", r"did you mean `optim\.lr`"),
        ("optim.lr.x=1", "it has no part 'x'"),
        ("optim.betas.2=1", "no such entry"),
        ("optim.betas.-1=1", "no such entry"),
        ("phases.cod.budget.steps=1", "no such entry; phases has: 0, 1, prose, code"),
        ("optim.lr=[1", "YAML"),
        ("optim.lr=!!python/object:os.system x", "tag"),
        ("data.sources.0=5", r"data\.sources\.0: must be a mapping"),
        ("seed=1\nlogging: 2", "seed"),
    ],
)
def test_a_bad_override_is_one_line(assignment: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        override(TWO, [assignment])
    assert "\n" not in str(refusal.value)


PATHS = [path.replace("NAME", name) for path in leaf_paths() for name in ("prose", "1")]
SECTIONS = ["phases", "phases.0", "phases.code.optim", "data.sources", "data.sources.0", "budget", "batch", "model"]
VALUES = [
    "null",
    "0",
    "-1",
    "1",
    "3",
    "1e-4",
    "1e400",
    ".nan",
    "true",
    "[]",
    "{}",
    "[1, 2]",
    "{a: 1}",
    "rope",
    "x",
    "'",
]


@given(st.lists(st.tuples(st.sampled_from(PATHS + SECTIONS) | st.text(max_size=8),
                          st.sampled_from(VALUES) | st.text(max_size=8)), min_size=1, max_size=3))  # fmt: skip
@example([("phases", "[1]"), ("phases.0.optim.lr", "3")])
@example([("budget", "5"), ("phases.0.budget", "null"), ("phases.0.budget.steps", "3")])
def test_any_override_is_refused_or_valid(pairs: list[tuple[str, str]]) -> None:
    try:
        config = override(TWO, [f"{path}={value}" for path, value in pairs])
    except ConfigError as refusal:
        assert str(refusal)
    else:
        assert build_config(load_yaml(dump_yaml(config))) == config
        json.dumps(fingerprint_fields(config, ()), allow_nan=False)


# ---- fingerprint --------------------------------------------------------------------------------------

# Said again, and not taken from the code: what may change without making another run.
FREE = re.compile(r"preset|logging\..*|checkpoint\..*|samples\..*|(phases\.\d\.)?data\.sources\.\d\.corpus")


def full() -> RunConfig:
    """A configuration in which every section is there, so that every leaf can be changed."""
    phase = PhaseConfig(name="only", data=SMALL.data, budget=SMALL.budget, schedule=ScheduleConfig(), optim=SMALL.optim)
    return SMALL.model_copy(update={"phases": (phase,)})  # unchecked: a run's budget beside the phase's


def one_change_each(part: Frozen, path: str = "") -> list[tuple[str, Frozen]]:
    """(dotted path, copy of `part` that differs there alone) for every leaf, found by introspection."""
    changes: list[tuple[str, Frozen]] = []
    for name, field in type(part).model_fields.items():
        value, here = getattr(part, name), f"{path}.{name}" if path else name
        for below, other in variants(field.annotation, value, here):
            changes.append((below, part.model_copy(update={name: other})))
    return changes


def variants(annotation: Any, value: Any, here: str) -> list[tuple[str, Any]]:
    if section_of(annotation) is not None:
        return one_change_each(value, here)
    elements = element_types(annotation)
    if elements is None:
        return [(here, another(annotation, value))]
    return [
        (below, (*value[:index], other, *value[index + 1 :]))
        for index, item in enumerate(value)
        for below, other in variants(elements[0], item, f"{here}.{index}")
    ]


def another(annotation: Any, value: Any) -> Any:
    """A value of the annotation's type that is not `value`."""
    options = [annotation]
    while nested := [arg for option in options for arg in typing.get_args(option) if not isinstance(option, str)]:
        words = [word for word in nested if isinstance(word, str)]
        if words:
            return next(word for word in words if word != value)
        options = [arg for arg in nested if isinstance(arg, type) or typing.get_origin(arg)]
        if all(isinstance(option, type) and not typing.get_args(option) for option in options):
            break
    kinds = [option for option in options if option is not type(None)]
    if bool in kinds:
        return not value
    if int in kinds:
        return (value or 0) + 1
    return (value or 0.0) / 3 + 0.1 if float in kinds else f"{value}-changed"


CHANGES = one_change_each(full())


def test_the_enumeration_reaches_every_leaf_of_the_schema() -> None:
    reached = {re.sub(r"\.\d", ".0", path).replace("phases.0", "phases.NAME") for path, _ in CHANGES}
    assert {path.removesuffix(".0") for path in reached if path not in leaf_paths()} | (
        reached & set(leaf_paths())
    ) == set(leaf_paths())


@pytest.mark.parametrize(("path", "changed"), CHANGES, ids=[path for path, _ in CHANGES])
def test_the_fingerprint_feels_exactly_what_changes_the_result(path: str, changed: RunConfig) -> None:
    assert changed != full()  # or the enumeration changed nothing
    same = fingerprint(changed, ("h",)) == fingerprint(full(), ("h",))
    assert same == bool(FREE.fullmatch(path))
    fields = differences(fingerprint_fields(full(), ("h",)), fingerprint_fields(changed, ("h",)))
    assert len(fields) == (0 if same else 1)
    assert all(line.startswith(f"{path}: ") for line in fields)


def test_the_fingerprint_feels_the_data_and_the_start() -> None:
    plain = fingerprint(SMALL, ("a", "b"))
    assert plain == fingerprint(SMALL, ["a", "b"])
    assert (
        len({plain, fingerprint(SMALL, ("b", "a")), fingerprint(SMALL, ("a",)), fingerprint(SMALL, ("a", "b"), "w")})
        == 4
    )
    moved = [override(SMALL, [f"init_from={path}"]) for path in ("runs/x", "/elsewhere/x")]
    assert fingerprint(moved[0], (), "weights") == fingerprint(moved[1], (), "weights")
    assert fingerprint(moved[0], (), "weights") != fingerprint(moved[0], (), "others")


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    fields = fingerprint_fields(SMALL, ("h",))
    assert json.loads(json.dumps(fields)) == fields
    assert re.fullmatch(r"[0-9a-f]{64}", fingerprint(SMALL, ("h",)))


def test_a_raised_budget_is_recognised() -> None:
    raised = override(TWO, ["phases.code.budget.steps=900"])
    old, new = fingerprint_fields(TWO, ()), fingerprint_fields(raised, ())
    differing = [path for path in new if old.get(path) != new[path]]
    assert differing == ["phases.1.budget.steps"]
    assert differences(old, new) == ["phases.1.budget.steps: 800 -> 900"]
    assert differences(old, old) == []
