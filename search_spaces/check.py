"""Whether every trial of a space can start: unknown paths, broken ranges, illegal values and what must stay equal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from random import Random
from typing import Any

from search_spaces.domains import Choice, Domain, Float, Int, Value, same
from search_spaces.held import why_held
from search_spaces.precisions import PRECISIONS, Device, refusal
from search_spaces.space import Axis, Space
from search_spaces.trial import PRECISION, SHAPE, SHARE, places, shared_phase, trial_config
from trainers.config import RunConfig
from trainers.config_io import check_path
from trainers.errors import ConfigError

GRID = 128  # a grid of at most so many combinations is built whole (some 0.5 ms each) ...
SAMPLES = 48  # ... and of a larger space so many random ones


def check(space: Space, config: RunConfig, device: Device, *, packages: bool = True) -> None:
    """Nothing, where every point of `space` makes a legal run of `config` on `device`.

    ConfigError otherwise, with one line for every problem. Ranges are tried at their ends, next to them and inside,
    choices at every option; combinations all, or a fixed random sample where there are more than GRID. `packages`: what
    is not installed here is a problem; not so of a space that another machine is to search.
    """
    if not space:
        raise ConfigError("the search space is empty: give it a path and a domain, such as optim.lr=log(1e-5,1e-3).")
    found: list[str] = []
    sound: list[Axis] = []
    for axis in space.axes:
        problems = _axis_problems(axis, space, config, device, packages)
        found += [f"{axis.path}: {problem}" for problem in problems]
        if not problems:
            sound.append(axis)
    found += _overlaps(space, config)
    found += _illegal_values(_governed(sound), config)
    if found:
        raise ConfigError("\n".join(dict.fromkeys(found)))


# ---- one axis -------------------------------------------------------------------------------------------


def _axis_problems(axis: Axis, space: Space, config: RunConfig, device: Device, packages: bool) -> list[str]:
    held = why_held(axis.path, config)
    found = [f"must not be searched: {held}."] if held else _path_problems(axis.path, config)
    found += axis.domain.problems() or ([] if found else _misread(axis, config))
    found += _condition_problems(axis, space)
    if axis.path == PRECISION:
        found += _precision_problems(axis.domain, config, device, packages)
    return found


def _path_problems(path: str, config: RunConfig) -> list[str]:
    if path in (PRECISION, SHAPE):
        return []
    try:
        if SHARE.fullmatch(path):
            shared_phase(path, config)
        else:
            check_path(config, path)
    except ConfigError as error:
        return [str(error).removeprefix(f"{path}: ")]
    return []


def _misread(axis: Axis, config: RunConfig) -> list[str]:
    """Values that the configuration would take for others, such as the text '16' for the number."""
    if axis.path in (PRECISION, SHAPE) or SHARE.fullmatch(axis.path):
        return []
    (place,) = places(axis.path, config)
    found = []
    for value in axis.domain.grid(2):
        try:
            read = _at(trial_config({axis.path: value}, config).model_dump(mode="json"), place)
        except ConfigError:  # said elsewhere, with what else is wrong
            continue
        if not same(read, value):
            found.append(f"{json.dumps(value)} is taken for {json.dumps(read)}: write {json.dumps(read)}.")
    return found


def _at(data: Any, place: str) -> Value:
    """The value at a plain path of a configuration's JSON values."""
    for part in place.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]
    return data


def _condition_problems(axis: Axis, space: Space) -> list[str]:
    when = axis.when
    if when is None:
        return []
    before = list(space)[: list(space).index(axis.path)]
    if when.path not in space:
        return [f"exists only {when.describe()}, but {when.path} is not searched: add it, or drop the condition."]
    if when.path not in before:
        return [f"exists only {when.describe()}, so {when.path} must stand before it in the space."]
    if not when.values:
        return [f"exists for no value of {when.path}: name at least one."]
    impossible = [value for value in when.values if not space[when.path].contains(value)]
    return [
        f"exists only when {when.path} is {value}, which is not among its values ({space[when.path].describe()})."
        for value in impossible
    ]


def _precision_problems(domain: Domain, config: RunConfig, device: Device, packages: bool) -> list[str]:
    names = ", ".join(PRECISIONS)
    if not isinstance(domain, Choice):
        return [f"must be a choice among {names}."]
    found = []
    for name in domain.values:
        if name not in PRECISIONS:
            found.append(f"there is no {name!r}; choose among {names}.")
        elif (why := refusal(name, config, device, packages=packages)) is not None:
            found.append(f"{name} cannot start here: {why}. Take it out of the choice.")
    return found


def _overlaps(space: Space, config: RunConfig) -> list[str]:
    """Axes that set the same value, under whatever name."""
    found = []
    set_by: list[tuple[str, str]] = []
    for path in space:
        mine = places(path, config)
        for place, other in set_by:
            if any(_inside(place, one) or _inside(one, place) for one in mine):
                found.append(f"{path}: {other} sets the same value already; search one of them.")
                break
        set_by += [(place, path) for place in mine]
    return found


def _inside(place: str, section: str) -> bool:
    return place == section or place.startswith(f"{section}.")


# ---- values in the configuration ------------------------------------------------------------------------


def _illegal_values(space: Space, config: RunConfig) -> list[str]:
    """What the configuration says about the points it refuses, each reduced to the values that matter.

    A value that is refused by itself is said once and left out of the points tried after it.
    """
    messages: list[str] = []
    combined: list[dict[str, Value]] = []
    critical = Space(tuple(Axis(axis.path, Choice(_critical(axis.domain)), axis.when) for axis in space.axes))
    while (refused := _first_refused(critical, combined, config)) is not None:
        cause, message = refused
        paths = list(cause)
        messages.append(_line(cause, message))
        if len(paths) > 1:
            combined.append(cause)
            continue
        critical = _without(critical, paths[0], cause[paths[0]], space[paths[0]])
        if not _at_an_end(space[paths[0]], cause[paths[0]]):
            messages[-1] += f" Not every value of {space[paths[0]].describe()} is legal: list those that are."
    return messages


def _first_refused(
    space: Space, known: list[dict[str, Value]], config: RunConfig
) -> tuple[dict[str, Value], str] | None:
    """The first point that is refused for another reason than the `known` combinations, reduced to its cause."""
    for point in _points(space):
        if not any(_part_of(cause, point) for cause in known) and (message := _refused(point, config)) is not None:
            return _reduced(point, message, config)
    return None


def _without(critical: Space, path: str, value: Value, domain: Domain) -> Space:
    """The critical points without a refused value; of a range one value inside speaks for all, so the ends stay."""
    kept: list[Axis] = []
    for axis in critical.axes:
        if axis.path == path:
            assert isinstance(axis.domain, Choice)
            left = [other for other in axis.domain.options if not same(other, value)]
            if not isinstance(domain, Choice):
                left = [other for other in left if _at_an_end(domain, other)]
            axis = Axis(path, Choice(tuple(left)), axis.when)
        if axis.domain != Choice(()):
            kept.append(axis)
    return _governed(kept)


def _at_an_end(domain: Domain, value: Value) -> bool:
    return isinstance(domain, Choice) or value in (domain.grid(2)[0], domain.grid(2)[-1])


def _governed(axes: list[Axis]) -> Space:
    """The axes without those whose condition's path is not among them."""
    kept: list[Axis] = []
    for axis in axes:
        if axis.when is None or axis.when.path in {other.path for other in kept}:
            kept.append(axis)
    return Space(tuple(kept))


def _points(space: Space) -> Iterator[dict[str, Value]]:
    """The points of a space of choices to build, every option of every axis among them; a function of the space."""
    whole = list(islice(space.grid(1), GRID + 1))
    if len(whole) <= GRID:
        yield from whole
        return
    rng = Random(0)
    for axis in space.axes:
        for value in axis.domain.grid(1):
            yield _through(space, axis, value, rng)
    for _ in range(SAMPLES):
        yield space.sample(rng)


def _through(space: Space, axis: Axis, value: Value, rng: Random) -> dict[str, Value]:
    """A random point in which `axis` exists and has `value`."""
    wanted = {axis.path: value}
    governed: Axis | None = axis
    while governed is not None and governed.when is not None:
        wanted[governed.when.path] = governed.when.values[0]
        governed = space.axis(governed.when.path)
    point: dict[str, Value] = {}
    for each in space.axes:
        if each.exists(point):
            drawn = each.domain.sample(rng)
            point[each.path] = wanted.get(each.path, drawn)
    return point


def _critical(domain: Domain) -> tuple[Value, ...]:
    """Where a rule would show that it is broken: the ends, their neighbours (multiples), the inside (whole numbers)."""
    match domain:
        case Choice():
            return domain.options
        case Float():
            return (domain.low, domain.high, domain.low + (domain.high - domain.low) * 0.381966)
        case Int():
            last = domain.low + (domain.high - domain.low) // domain.step * domain.step
            return tuple(dict.fromkeys((domain.low, last, domain.low + domain.step, domain.grid(3)[1])))


def _refused(point: Mapping[str, Value], config: RunConfig) -> str | None:
    """The first line of what is wrong with the trial at `point`; None where it is legal."""
    try:
        trial_config(point, config)
    except ConfigError as error:
        return str(error).partition("\n")[0]
    return None


def _reduced(point: dict[str, Value], message: str, config: RunConfig) -> tuple[dict[str, Value], str]:
    """The fewest values of a refused point that are refused by themselves, and what is said about them."""
    cause = dict(point)
    for path in point:
        smaller = {other: value for other, value in cause.items() if other != path}
        if smaller and (said := _refused(smaller, config)) is not None:
            cause, message = smaller, said
    return cause, message


def _part_of(cause: Mapping[str, Value], point: Mapping[str, Value]) -> bool:
    return all(path in point and same(point[path], value) for path, value in cause.items())


def _line(cause: Mapping[str, Value], message: str) -> str:
    """The message, with the refused values before it unless it begins with the only path concerned."""
    if len(cause) == 1 and message.startswith(tuple(cause)):
        return message
    return f"{' with '.join(f'{path}={_shown(value)}' for path, value in cause.items())}: {message}"


def _shown(value: Value) -> str:
    return value if isinstance(value, str) else repr(value)
