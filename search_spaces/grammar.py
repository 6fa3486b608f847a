"""Search spaces as people write them, on the command line and in YAML.

    optim.lr: log(1e-5, 1e-3)                  # real numbers, evenly likely in their logarithm
    model.dropout: uniform(0, 0.3)             # real numbers
    schedule.warmup_steps: int(0, 400, 50)     # whole numbers; the step is 1 where it is left out
    model.d_ff: logint(64, 1024)               # whole numbers, evenly likely in their logarithm
    batch.sequences: [8, 16, 32]               # a choice; choice(8, 16, 32) on the command line means the same
    optim.betas: [[0.9, 0.95], [0.9, 0.999]]
    schedule:                                  # sections may be nested
      kind: [cosine, wsd]
      decay_fraction:                          # exists only where the schedule is wsd
        domain: uniform(0.05, 0.5)
        when: {schedule.kind: wsd}

Numbers follow YAML 1.2: `1e-4` is one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from search_spaces.domains import Choice, Domain, Float, Int, Value, plain
from search_spaces.space import Axis, Space, When
from trainers import yaml12
from trainers.errors import ConfigError

GRAMMAR = (
    "a domain is log(LOW, HIGH), uniform(LOW, HIGH), int(LOW, HIGH), int(LOW, HIGH, STEP), logint(LOW, HIGH), "
    "choice(A, B, ...) or [A, B, ...]"
)
KINDS = ("log", "uniform", "int", "logint", "choice")
SHOWN = 120  # characters of what was typed, in a message
# what other programs call them
_ALSO = {"loguniform": "log", "logfloat": "log", "float": "uniform", "linear": "uniform", "randint": "int",
         "quniform": "int", "range": "int", "integer": "int", "lograndint": "logint", "intlog": "logint",
         "categorical": "choice", "options": "choice", "values": "choice", "grid": "choice"}  # fmt: skip

_CALL = re.compile(r"(?P<kind>[A-Za-z_][A-Za-z_0-9]*)\s*\((?P<arguments>.*)\)", re.DOTALL)
_ASSIGNMENT = re.compile(
    r"(?P<path>[^\s=]+)\s*=\s*(?P<domain>.+?)(?:(?<=[)\]])\s+when\s+(?P<parent>[^\s=]+)\s*=\s*(?P<values>.+))?",
    re.DOTALL,
)
_WORD = re.compile(r"[A-Za-z0-9_./+-]+")


def parse_domain(text: str) -> Domain:
    """The domain that `log(1e-5, 1e-3)` and its like mean. ConfigError, with the grammar, for any other text.

    Whether the range is a sensible one is not asked here: `search_spaces.check` says all of that at once.
    """
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return Choice(tuple(_arguments(text, text[1:-1])))
    found = _CALL.fullmatch(text)
    if found is None:
        raise ConfigError(f"{_quoted(text)} is no domain{_hint(text)}; {GRAMMAR}.")
    kind, values = found["kind"], _arguments(text, found["arguments"])
    if kind == "choice":
        return Choice(tuple(values))
    if kind in ("log", "uniform"):
        low, high = _numbers(text, kind, values, counts=(2,), whole=False)
        return Float(low, high, log=kind == "log")
    if kind in ("int", "logint"):
        numbers = _numbers(text, kind, values, counts=(2, 3) if kind == "int" else (2,), whole=True)
        return Int(numbers[0], numbers[1], log=kind == "logint", step=numbers[2] if len(numbers) > 2 else 1)
    meant = _ALSO.get(kind.lower()) or next(iter(difflib.get_close_matches(kind.lower(), KINDS, n=1)), None)
    asked = f" (did you mean {meant}(...)?)" if meant else ""
    raise ConfigError(f"{_quoted(text)}: there is no {kind}(...){asked}; {GRAMMAR}.")


def spell_domain(domain: Domain) -> str:
    """The text that `parse_domain` turns into an equal domain, on one line."""
    match domain:
        case Float():
            return f"{'log' if domain.log else 'uniform'}({_spelled(domain.low)}, {_spelled(domain.high)})"
        case Int():
            step = f", {domain.step}" if domain.step != 1 else ""
            return f"{'logint' if domain.log else 'int'}({domain.low}, {domain.high}{step})"
        case Choice():
            return f"choice({', '.join(map(_spelled, domain.values))})"


def parse_assignment(text: str) -> Axis:
    """The axis that `optim.lr=log(1e-5,1e-3)` means; ` when schedule.kind=wsd` (or `=[wsd, linear]`) may follow."""
    found = _ASSIGNMENT.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"an axis is PATH=DOMAIN, such as optim.lr=log(1e-5,1e-3), got {_quoted(text)}; {GRAMMAR}.")
    path = found["path"]
    try:
        when = None if found["values"] is None else When(found["parent"], _listed(yaml12.parse(found["values"])))
        return Axis(path, parse_domain(found["domain"]), when)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def spell_axis(axis: Axis) -> str:
    """The text that `parse_assignment` turns into an equal axis, on one line."""
    when = f" when {axis.when.path}=[{', '.join(map(_spelled, plain(axis.when.values)))}]" if axis.when else ""
    return f"{axis.path}={spell_domain(axis.domain)}{when}"


def load_space(text: str) -> Space:
    """The space that YAML `text` describes; the module's docstring shows one. ConfigError, with the path, otherwise."""
    data = yaml12.parse(text)
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"a search space in YAML is a mapping, such as optim.lr: log(1e-5, 1e-3); {GRAMMAR}.")
    return Space(tuple(_axes(data, "")))


def dump_space(space: Space) -> str:
    """YAML that `load_space` turns into an equal space."""
    data: dict[str, Any] = {}
    for axis in space.axes:
        domain = axis.domain.values if isinstance(axis.domain, Choice) else spell_domain(axis.domain)
        when = {axis.when.path: plain(axis.when.values)} if axis.when else None
        data[axis.path] = domain if when is None else {"domain": domain, "when": when}
    return yaml12.dump(data)


# ---- YAML -----------------------------------------------------------------------------------------------


def _axes(data: Mapping[str, Any], section: str) -> list[Axis]:
    axes: list[Axis] = []
    for key, value in data.items():
        path = f"{section}.{key}" if section else key
        if isinstance(value, dict) and "domain" not in value:
            if not value or "when" in value:
                raise ConfigError(f"{path}: has no domain: write {path}: [8, 16], or {{domain: ..., when: {{...}}}}.")
            axes += _axes(value, path)
        else:
            axes.append(_axis(path, value))
    return axes


def _axis(path: str, value: Any) -> Axis:
    try:
        if not isinstance(value, dict):
            return Axis(path, _domain(value))
        unknown = sorted(set(value) - {"domain", "when"})
        if unknown:
            raise ConfigError(f"beside domain there may be `when` alone, not {', '.join(unknown)}.")
        return Axis(path, _domain(value["domain"]), _condition(value["when"]) if "when" in value else None)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _domain(value: Any) -> Domain:
    if isinstance(value, str):
        return parse_domain(value)
    if isinstance(value, list):
        return Choice(_scalars_or_lists(value, str(value)))
    raise ConfigError(f"{value!r} is no domain{_hint(str(value))}; {GRAMMAR}.")


def _condition(data: Any) -> When:
    if not isinstance(data, dict) or len(data) != 1:
        raise ConfigError(f"`when` is one path with its value or list of values, such as {{schedule.kind: wsd}}, "
                          f"got {data!r}.")  # fmt: skip
    ((path, value),) = data.items()
    return When(path, _listed(value))


def _listed(value: Value) -> tuple[Value, ...]:
    return _scalars_or_lists(value if isinstance(value, list) else [value], str(value))


# ---- arguments ------------------------------------------------------------------------------------------


def _arguments(text: str, inside: str) -> tuple[Value, ...]:
    try:
        values = yaml12.parse(f"[{inside}\n]")
    except ConfigError as error:
        why = str(error).removesuffix(".")
        raise ConfigError(f"{_quoted(text)}: the values must be a list such as 8, 16, 32 ({why}); {GRAMMAR}.") from None
    if not isinstance(values, list):
        raise ConfigError(f"{_quoted(text)}: the values must be a list such as 8, 16, 32; {GRAMMAR}.")
    return _scalars_or_lists(values, text)


def _scalars_or_lists(values: list[Any], text: str) -> tuple[Value, ...]:
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    if any(isinstance(item, (dict, list)) for item in flat):
        raise ConfigError(f"{_quoted(text)}: a value is a number, a word, true, false, null or a list of them.")
    return tuple(values)


def _numbers(text: str, kind: str, values: tuple[Value, ...], *, counts: tuple[int, ...], whole: bool) -> list[Any]:
    wanted = "whole numbers" if whole else "numbers"
    types = (int,) if whole else (int, float)
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, types)]
    if len(values) not in counts or wrong:
        got = f"{wrong[0]!r}" if wrong else f"{len(values)}"
        raise ConfigError(
            f"{_quoted(text)}: {kind} takes {' or '.join(map(str, counts))} {wanted}, got {got}; {GRAMMAR}."
        )
    return list(values)


def _hint(text: str) -> str:
    if "(" in text and ")" not in text:
        return " (its bracket is not closed; inside the { } of YAML, put it in quotes)"
    return " but one value, which leaves nothing to search (set it as an override)" if _WORD.fullmatch(text) else ""


def _quoted(text: str) -> str:
    """What was typed, for a message; the beginning of what is longer than a line."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}... ({len(text):,} characters)"


def _spelled(value: Value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_spelled, value))}]"
    if isinstance(value, str) and _WORD.fullmatch(value) and _is_plain(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _is_plain(word: str) -> bool:
    """Whether YAML reads it as itself without quotes, before a comma and before a line's end alike."""
    try:
        return bool(yaml12.parse(f"[{word}, {word}\n]") == [word, word])
    except ConfigError:
        return False
