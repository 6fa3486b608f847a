"""YAML text to plain values and back, by the YAML 1.2 core schema and with bounds.

PyYAML follows YAML 1.1, where `1e-4` is text, `on` is true, `012` is ten and `12:30` is 750. Here `1e-4` is a
number, `on` and `yes` are text and `012` is twelve. Duplicate keys, keys that are not text, object tags,
self-reference, deep nesting and alias bombs are refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from trainers.errors import ConfigError

MAX_CHARACTERS = 256 * 1024  # a resolved configuration has about 3,000
MAX_VALUES = 20_000  # with every alias expanded
MAX_DEPTH = 40
MAX_DIGITS = 40  # int() refuses 4,300 digits with an error of its own, and takes quadratic time before that

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}

# (tag, pattern, the characters such a scalar can start with); int is tried before float
_CORE_SCHEMA: tuple[tuple[str, str, str], ...] = (
    ("null", r"(?:~|null|Null|NULL|)\Z", "~nN\0"),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", "tTfF"),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z", "-+0123456789"),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
        "-+0123456789.",
    ),
    ("merge", r"<<\Z", "<"),
)


def load(text: str) -> dict[str, Any]:
    """The mapping that YAML `text` holds. ConfigError, with the line, for anything else."""
    data = parse(text)
    if data is None:
        raise ConfigError("the YAML is empty: it must be a mapping of keys to values, such as `budget: {steps: 300}`.")
    if not isinstance(data, dict):
        raise ConfigError(
            f"the YAML must be a mapping of keys to values at the top, such as `seed: 42`, not a {_kind(data)}."
        )
    return data


def parse(text: str) -> Any:
    """The value that YAML `text` holds: a scalar, a list or a mapping. ConfigError, with the line, where broken."""
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"the YAML has {len(text):,} characters; a configuration has at most {MAX_CHARACTERS:,}.")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _Survey().measure(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(_one_line(error)) from None


def dump(data: dict[str, Any], header: str = "") -> str:
    """YAML that `load` reads back as exactly `data`; lists of scalars stand on one line. ASCII controls are escaped."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    body = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)
    return comment + body


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own name

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth >= MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would read as something other than text."""


class _Survey:
    """Walks a composed document once and refuses what must not be constructed."""

    def __init__(self) -> None:
        self.measured: dict[int, tuple[int, int]] = {}  # node -> (values, depth) with aliases expanded
        self.entered: set[int] = set()

    def measure(self, node: yaml.Node) -> tuple[int, int]:
        if id(node) in self.measured:
            return self.measured[id(node)]
        if id(node) in self.entered:
            raise _refusal(node, "an anchor refers to itself")
        if node.tag not in _PLAIN_TAGS:
            raise _refusal(node, f"the tag {node.tag} is not allowed: plain text, numbers, lists and mappings are")
        self.entered.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
        inner = [self.measure(child) for child in _children(node)]
        values, depth = 1 + sum(v for v, _ in inner), 1 + max((d for _, d in inner), default=0)
        if values > MAX_VALUES or depth > MAX_DEPTH:
            raise _refusal(node, f"more than {MAX_VALUES:,} values or {MAX_DEPTH} levels once aliases are expanded")
        self.measured[id(node)] = values, depth
        return values, depth

    @staticmethod
    def _check_keys(node: yaml.MappingNode) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith((":str", ":merge")):
                raise _refusal(key, "a key must be text")
            if key.value in lines:
                raise _refusal(key, f"duplicate key {key.value!r}; it stands on line {lines[key.value]} already")
            lines[key.value] = key.start_mark.line + 1


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refusal(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, node.start_mark)


def _one_line(error: yaml.YAMLError) -> str:
    """What is wrong with the YAML and where, on one line."""
    if isinstance(error, yaml.reader.ReaderError):
        character = error.character if isinstance(error.character, int) else ord(str(error.character)[:1] or "\0")
        return f"YAML: the character U+{character:04X} at position {error.position} is not allowed."
    if isinstance(error, yaml.MarkedYAMLError) and error.problem is not None:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return f"YAML {where}{' '.join(error.problem.split())}."
    return f"YAML: {' '.join(str(error).split())}."


def _kind(data: Any) -> str:
    return {list: "list", str: "text", bool: "true or false"}.get(type(data), "number")


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    digits = text[2:] if base != 10 else text
    if len(digits) > MAX_DIGITS:
        raise _refusal(node, f"a whole number of {len(digits)} digits is too large")
    try:
        return int(digits, base)
    except ValueError:
        raise _refusal(node, f"{text!r} is not a whole number") from None


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node))
    try:
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except ValueError:
        raise _refusal(node, f"{text!r} is not a number") from None


def _construct_bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    text = str(loader.construct_scalar(node)).lower()
    if text not in ("true", "false"):
        raise _refusal(node, f"{text!r} is neither true nor false")
    return text == "true"


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    scalars = not any(isinstance(item, (list, dict)) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=scalars)


for _name, _pattern, _first in _CORE_SCHEMA:
    _starts = [character if character != "\0" else "" for character in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _starts)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _starts)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:bool", _construct_bool)
_Dumper.add_representer(list, _represent_list)
_Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]  # no &id001 in a config
