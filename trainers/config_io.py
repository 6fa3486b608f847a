"""RunConfig from and to text: YAML, dotted overrides, the fingerprint and what differs between two runs."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from trainers import yaml12
from trainers.config import EXCLUSIVE, Frozen, PhaseConfig, RunConfig
from trainers.config_paths import allows_null, did_you_mean, element_types, is_text, section_of
from trainers.errors import ConfigError

FINGERPRINT_VERSION = 1  # raise it when the same fields come to mean another result

# What does not change the weights. Corpora count by their content (`data_hashes`), wherever they lie.
NOT_FINGERPRINTED = re.compile(r"preset|(logging|checkpoint|samples)\..+|(phases\.\d+\.)?data\.sources\.\d+\.corpus")

# Fields younger than runs that may go on: at these values they change nothing, and count only at others.
ADDED: dict[str, Any] = {
    "optim.beta3": 0.9999, "optim.slow_weight": 5.0, "optim.min_8bit_size": 4096, "optim.paged": False,
    "precision.weights": "native", "precision.optimizer_state": "fp32", "precision.bf16_weights": False,
    "precision.tf32": False, "precision.adapter_rank": 0, "precision.adapter_alpha": 32.0,
    "engine": "torch", "parallel": "ddp", "deepspeed.zero_stage": 2, "deepspeed.offload_optimizer": False,
    "deepspeed.offload_parameters": False, "deepspeed.config": None,
}  # fmt: skip

_OF_A_PHASE = re.compile(r"^phases\.\d+\.")
_INHERITED = ("data", "budget", "schedule", "optim")  # what a phase takes from the run where it is silent


# ---- YAML ---------------------------------------------------------------------------------------------


def load_yaml(text: str) -> dict[str, Any]:
    """The mapping in YAML `text`, read by YAML 1.2 (`1e-4` is a number). ConfigError with the line otherwise."""
    return yaml12.load(text)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file at `path`. ConfigError where it is missing, too big, not UTF-8 or not YAML."""
    try:
        with path.open("rb") as file:
            raw = file.read(4 * yaml12.MAX_CHARACTERS + 1)
        return load_yaml(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def dump_yaml(config: RunConfig, header: str = "") -> str:
    """YAML of every field of `config`, which `build_config(load_yaml(...))` turns into an equal one.

    `header` becomes comment lines at the top.
    """
    return yaml12.dump(config.model_dump(mode="json"), header)


# ---- building, with messages for people ---------------------------------------------------------------


def build_config(data: Mapping[str, Any]) -> RunConfig:
    """The RunConfig that `data` describes. ConfigError with one line a problem: path, rule, value, way out."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    broken = {problem["loc"] for problem in problems}
    causes = [  # a list is also called too short when its entries are broken
        problem
        for problem in problems
        if problem["type"] != "too_short"
        or not any(len(loc) > len(problem["loc"]) and loc[: len(problem["loc"])] == problem["loc"] for loc in broken)
    ]
    raise ConfigError("\n".join(dict.fromkeys(_problem(problem, data) for problem in causes)))


def _problem(problem: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    location = problem["loc"]
    path = _dotted(location, data)
    match problem["type"]:
        case "extra_forbidden":
            parent = _dotted(location[:-1], data)
            return f"{path}: unknown key; {did_you_mean(parent, _section_at(location[:-1]), str(location[-1]))}"
        case "value_error":
            return _prefixed(path, str(problem["ctx"]["error"]))
        case "missing":
            return f"{path}: required, but missing."
        case "model_type":
            keys = ", ".join(_section_at(location).model_fields)
            return f"{path or 'the configuration'}: must be a mapping (of {keys}), got {_shown(problem['input'])}."
        case "literal_error":
            expected = problem["ctx"]["expected"]
            return f"{path}: must be {expected}, got {_shown(problem['input'])}."
        case "string_type":
            return f"{path}: must be text, got {_shown(problem['input'])}; put it in quotes."
        case "tuple_type":
            return f"{path}: must be a list, got {_shown(problem['input'])}."
    if problem["type"] == "too_short":
        return f"{path}: needs at least {problem['ctx']['min_length']} item, got none."
    rule = problem["msg"].replace("Input should be", "must be").replace("Input should have", "must have")
    return f"{path}: {rule}, got {_shown(problem['input'])}."


def _prefixed(path: str, message: str) -> str:
    """`message` with the path in front, once."""
    if not path or message.startswith(path):
        return message
    name = path.rsplit(".", 1)[-1]
    return f"{path}: {message.removeprefix(f'{name}: ')}"


def _dotted(location: Sequence[int | str], data: Any) -> str:
    """A pydantic location as the dotted path of an override: phases by name where they have one."""
    parts: list[str] = []
    for key in location:
        data = data[key] if _has(data, key) else None
        named = parts == ["phases"] and isinstance(data, Mapping) and isinstance(data.get("name"), str)
        parts.append(data["name"] if named else str(key))
    return ".".join(parts)


def _has(data: Any, key: int | str) -> bool:
    if isinstance(data, Mapping):
        return key in data
    return isinstance(data, (list, tuple)) and isinstance(key, int) and key < len(data)


def _section_at(location: Sequence[int | str]) -> type[Frozen]:
    """The part of the schema at a pydantic location."""
    annotation: Any = RunConfig
    for key in location:
        if (elements := element_types(annotation)) is not None:
            annotation = elements[0]
        else:
            section = section_of(annotation)
            assert section is not None
            annotation = section.model_fields[str(key)].annotation
    section = section_of(annotation)
    assert section is not None
    return section


def _shown(value: Any) -> str:
    return "nothing (null)" if value is None else reprlib.repr(value)


# ---- dotted overrides ---------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a dotted path leads in the plain data of a configuration."""

    holder: Any  # the mapping or list that holds the value
    key: Any  # its key or index there
    annotation: Any  # what the schema says about the value
    section: type[Frozen] | None  # the part the holder is; None for a list


def override(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """`config` with `path=value` assignments applied: `optim.lr=1e-3`, `phases.code.budget.steps=50`, `betas=[.9,.95]`.

    Values follow the YAML rules; `null` clears. Setting one of steps, tokens and epochs clears the others. A path
    into what a phase inherits starts from the run's own value, after the run's own assignments, whatever their order.
    """
    data: dict[str, Any] = config.model_dump(mode="json")
    pairs = [_split(assignment) for assignment in assignments]
    chosen: dict[int, tuple[str, Any]] = {}  # id of a section -> (path, holder kept alive) that chose among its rivals
    for path, text in sorted(pairs, key=lambda pair: pair[0].startswith("phases.")):
        place = _find(data, path)
        place.holder[place.key] = _value(text, place.annotation, path)
        _clear_rivals(place, path, chosen)
    _drop_unused_budget(data, [path for path, _ in pairs])
    return build_config(data)


def check_path(config: RunConfig, path: str) -> None:
    """Nothing, where an override could set `path`. ConfigError, with what was meant, elsewhere and for a section."""
    place = _find(config.model_dump(mode="json"), path)
    elements = element_types(place.annotation)
    section = section_of(place.annotation) or (section_of(elements[0]) if elements else None)
    if section is not None:
        raise ConfigError(f"{path}: a whole section, not one value; it holds {', '.join(section.model_fields)}.")


def _split(assignment: str) -> tuple[str, str]:
    path, equals, text = assignment.partition("=")
    path, text = path.strip(), text.strip()
    if not equals or not path:
        raise ConfigError(f"an override is path=value, such as budget.steps=300; got {_shown(assignment)}.")
    if not text:
        raise ConfigError(f"{path}= has no value. Write {path}=null to clear it.")
    return path, text


def _find(data: dict[str, Any], path: str) -> _Place:
    """The place `path` names. Fills in inherited sections on the way, which an override is about to change."""
    holder: Any = data
    annotation: Any = RunConfig
    rest = path.split(".")
    walked: list[str] = []
    key: int | str
    while True:
        section = section_of(annotation)
        if section is not None:
            key, rest, annotation = _enter_section(section, rest, walked)
        else:
            key, rest, annotation = _enter_list(annotation, holder, rest, walked)
        if not rest:
            return _Place(holder, key, annotation, section)
        if section is not None and holder.get(key) is None:
            inherited = data.get(key) if section is PhaseConfig and key in _INHERITED else None
            holder[key] = copy.deepcopy(inherited) if inherited is not None else _nothing(annotation)
        holder = holder[key]
        if _nothing(annotation) is None or not isinstance(holder, type(_nothing(annotation))):
            raise ConfigError(f"{'.'.join(walked)} is {_shown(holder)}: it has no part {_shown('.'.join(rest))}.")


def _nothing(annotation: Any) -> Any:
    """The empty holder that a field of this type would have: a mapping, a list, or None for a single value."""
    if section_of(annotation) is not None:
        return {}
    return [] if element_types(annotation) is not None else None


def _enter_section(section: type[Frozen], rest: list[str], walked: list[str]) -> tuple[str, list[str], Any]:
    key = rest[0]
    if key not in section.model_fields:
        parent = ".".join(walked)
        raise ConfigError(f"{'.'.join([*walked, key])}: unknown path; {did_you_mean(parent, section, key)}")
    walked.append(key)
    return key, rest[1:], section.model_fields[key].annotation


def _enter_list(annotation: Any, holder: Any, rest: list[str], walked: list[str]) -> tuple[int, list[str], Any]:
    elements = element_types(annotation)
    assert elements is not None
    where = ".".join(walked)
    names = [item.get("name") for item in holder if isinstance(item, dict)] if elements[0] is PhaseConfig else []
    for length in range(len(rest), 0, -1):  # a phase's name may hold dots
        if (name := ".".join(rest[:length])) in names:
            index, rest = names.index(name), rest[length:]
            break
    else:
        key, *rest = rest
        if not key.isascii() or not key.isdigit() or len(key) > 6 or int(key) >= len(holder):
            known = ", ".join([*map(str, range(len(holder))), *map(str, names)]) or "no entries"
            raise ConfigError(f"{where}.{key}: no such entry; {where} has: {known}. Write a new list as {where}=[...].")
        index = int(key)
    walked.append(str(index))
    return index, rest, elements[min(index, len(elements) - 1)] if elements[-1] is not ... else elements[0]


def _value(text: str, annotation: Any, path: str) -> Any:
    """The value that `text` means for a field: text fields take it as it stands, others by the YAML rules."""
    if is_text(annotation):
        if allows_null(annotation) and text in ("null", "~"):
            return None
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    try:
        return yaml12.parse(text)
    except ConfigError as error:
        raise ConfigError(f"{path}={reprlib.repr(text)}: {error}") from None


def _clear_rivals(place: _Place, path: str, chosen: dict[int, tuple[str, Any]]) -> None:
    """Of fields that exclude one another the one just set stays. ConfigError where two were asked for."""
    group = EXCLUSIVE.get(place.section, ()) if place.section else ()
    if place.key not in group or place.holder[place.key] is None:
        return
    before, _ = chosen.setdefault(id(place.holder), (path, place.holder))
    if before != path:
        raise ConfigError(f"{before} and {path} exclude each other: set one of them.")
    for rival in group:
        if rival != place.key:
            place.holder[rival] = None


def _drop_unused_budget(data: dict[str, Any], paths: list[str]) -> None:
    """Clears the run's budget once overrides have given every phase its own."""
    asked_for = any(path.split(".")[0] == "budget" for path in paths)
    phases = data["phases"]
    if isinstance(phases, list) and phases and not asked_for:
        own = [isinstance(phase, dict) and phase.get("budget") is not None for phase in phases]
        if all(own):
            data["budget"] = None


# ---- identity -----------------------------------------------------------------------------------------


def fingerprint_fields(
    config: RunConfig, data_hashes: Sequence[str], init_hash: str = "", tuned: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that changes the result, flat: dotted path -> value. JSON keeps it as it is.

    `data_hashes` stand for the corpora and, where given, `init_hash` for the run it starts from and `tuned` for its
    ds_config.json (deepspeed_config.tuned_by): content, not paths.
    """
    every = _flat(config.model_dump(mode="json"))
    fields = {
        path: value
        for path, value in every
        if not NOT_FINGERPRINTED.fullmatch(path) and not _is_new_default(path, value)
    }
    if init_hash:
        fields["init_from"] = init_hash
    if tuned is not None:
        fields.pop("deepspeed.config", None)
        fields |= {f"deepspeed.config.{path}": value for path, value in tuned.items()}
    return fields | {f"data.hashes.{index}": value for index, value in enumerate(data_hashes)}


def _is_new_default(path: str, value: Any) -> bool:
    plain = _OF_A_PHASE.sub("", path)
    return plain in ADDED and bool(ADDED[plain] == value)


def fingerprint(
    config: RunConfig, data_hashes: Sequence[str], init_hash: str = "", tuned: Mapping[str, Any] | None = None
) -> str:
    """64 hex digits (SHA-256 of canonical JSON) that two runs share exactly when their fields and data are equal."""
    fields = fingerprint_fields(config, data_hashes, init_hash, tuned)
    text = json.dumps({"version": FINGERPRINT_VERSION, "fields": fields}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`optim.lr: 0.001 -> 0.002` for every field of two fingerprints that differs; empty when none does."""
    absent = object()
    lines = []
    for path in dict.fromkeys([*new, *old]):
        before, after = old.get(path, absent), new.get(path, absent)
        if before is absent or after is absent or before != after or type(before) is not type(after):
            left, right = ("(not set)" if value in (absent, None) else str(value) for value in (before, after))
            lines.append(f"{path}: {left} -> {right}")
    return lines


def _flat(data: Any, path: str = "") -> list[tuple[str, Any]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if items is None:
        return [(path, data)]
    return [leaf for key, value in items for leaf in _flat(value, f"{path}.{key}" if path else str(key))]
