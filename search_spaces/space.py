"""A search space: an ordered mapping from dotted configuration paths to domains, some of them conditional."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search_spaces.domains import Choice, Domain, Float, Int, Value, frozen, plain, same
from trainers.errors import ConfigError

__all__ = ["Axis", "Choice", "Domain", "Float", "Int", "Space", "Value", "When"]


@dataclass(frozen=True)
class When:
    """The condition that another path of the space has one of `values`."""

    path: str
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", frozen(self.values))

    def holds(self, params: Mapping[str, Value]) -> bool:
        """Whether it does in `params`; a path that does not exist there has no value."""
        return self.path in params and any(same(params[self.path], value) for value in self.values)

    def describe(self) -> str:
        return f"when {self.path} is {' or '.join(map(str, plain(self.values)))}"


@dataclass(frozen=True)
class Axis:
    """One path with its domain, and the condition under which it exists; None: always."""

    path: str
    domain: Domain
    when: When | None = None

    def exists(self, params: Mapping[str, Value]) -> bool:
        """Whether it does where the axes before it have the values in `params`."""
        return self.when is None or self.when.holds(params)

    def describe(self) -> str:
        return f"{self.domain.describe()} {self.when.describe()}" if self.when else self.domain.describe()


@dataclass(frozen=True)
class Space(Mapping[str, Domain]):
    """Axes in order, a condition's path before the path that it governs. Values of a point are JSON values.

    Two axes of one path are refused with ConfigError. What else may be wrong is for `search_spaces.check` to say.
    """

    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        paths = [axis.path for axis in self.axes]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise ConfigError(f"{', '.join(twice)}: given twice in the search space; leave one.")

    def __getitem__(self, path: str) -> Domain:
        return self.axis(path).domain

    def __iter__(self) -> Iterator[str]:
        return (axis.path for axis in self.axes)

    def __len__(self) -> int:
        return len(self.axes)

    def axis(self, path: str) -> Axis:
        """The axis of `path`. KeyError where the space has none."""
        for axis in self.axes:
            if axis.path == path:
                return axis
        raise KeyError(path)

    def with_axis(self, axis: Axis) -> Space:
        """This space with `axis` in the place of the one of its path, or at the end."""
        kept = tuple(axis if old.path == axis.path else old for old in self.axes)
        return Space(kept if axis.path in self else (*kept, axis))

    # ---- points -----------------------------------------------------------------------------------------

    def sample(self, rng: Random) -> dict[str, Value]:
        """A point of the space: path -> value of every axis that exists there. A function of the generator's state."""
        point: dict[str, Value] = {}
        for axis in self.axes:
            if axis.exists(point):
                point[axis.path] = axis.domain.sample(rng)
        return point

    def grid(self, points_per_axis: int) -> Iterator[dict[str, Value]]:
        """Every combination of `points_per_axis` values an axis (all options of a choice), the last axis fastest.

        An axis adds nothing where it does not exist, so no point comes twice.
        """
        if points_per_axis < 1:
            raise ConfigError(f"a grid needs at least 1 point an axis, got {points_per_axis}.")
        return self._grid(0, {}, [axis.domain.grid(points_per_axis) for axis in self.axes])

    def _grid(self, index: int, point: dict[str, Value], values: list[tuple[Value, ...]]) -> Iterator[dict[str, Value]]:
        if index == len(self.axes):
            yield dict(point)
            return
        axis = self.axes[index]
        if not axis.exists(point):
            yield from self._grid(index + 1, point, values)
            return
        for value in values[index]:
            yield from self._grid(index + 1, point | {axis.path: value}, values)

    def holds(self, point: Mapping[str, Value]) -> bool:
        """Whether `point` is one of this space: exactly the axes that exist there, each inside its domain."""
        expected = {axis.path for axis in self.axes if axis.exists(point)}
        return set(point) == expected and all(self[path].contains(value) for path, value in point.items())

    # ---- text and JSON ----------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        """Path -> its domain in one line, such as `log 1e-05 .. 0.001`."""
        return {axis.path: axis.describe() for axis in self.axes}

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values that `from_json` turns into an equal space; a list, since the order of the axes counts."""
        return [_axis_json(axis) for axis in self.axes]

    @staticmethod
    def from_json(data: Any) -> Space:
        """The space that `to_json` wrote. ConfigError where `data` is not what it writes."""
        try:
            axes = _Axes.model_validate({"axes": data}).axes
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"][1:])) or "the list of axes"
            raise ConfigError(f"no search space: {where}: {first['msg'].lower()}.") from None
        return Space(tuple(axis.value() for axis in axes))


# ---- the JSON form --------------------------------------------------------------------------------------


class _Json(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Float(_Json):
    kind: Literal["float"]
    low: float
    high: float
    log: bool

    def value(self) -> Float:
        return Float(self.low, self.high, self.log)


class _Int(_Json):
    kind: Literal["int"]
    low: int
    high: int
    log: bool
    step: int

    def value(self) -> Int:
        return Int(self.low, self.high, self.log, self.step)


class _Choice(_Json):
    kind: Literal["choice"]
    options: list[Any]

    def value(self) -> Choice:
        return Choice(tuple(self.options))


class _When(_Json):
    path: str
    values: list[Any]


class _Axis(_Json):
    path: str
    domain: Annotated[_Float | _Int | _Choice, Field(discriminator="kind")]
    when: _When | None = None

    def value(self) -> Axis:
        when = When(self.when.path, tuple(self.when.values)) if self.when else None
        return Axis(self.path, self.domain.value(), when)


class _Axes(_Json):
    axes: list[_Axis]


def _axis_json(axis: Axis) -> dict[str, Any]:
    data = {"path": axis.path, "domain": _domain_json(axis.domain)}
    if axis.when is not None:
        data["when"] = {"path": axis.when.path, "values": plain(axis.when.values)}
    return data


def _domain_json(domain: Domain) -> dict[str, Any]:
    match domain:
        case Float():
            return {"kind": "float", "low": domain.low, "high": domain.high, "log": domain.log}
        case Int():
            return {"kind": "int", "low": domain.low, "high": domain.high, "log": domain.log, "step": domain.step}
        case Choice():
            return {"kind": "choice", "options": domain.values}
