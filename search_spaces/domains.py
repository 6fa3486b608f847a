"""What one path of a configuration may become: a range of numbers or a choice.

A domain may be built broken (low above high, nothing to choose from): `problems` says so, and `check` collects them
over a whole space. Everything else asks for a sound one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any, TypeAlias

Value: TypeAlias = Any
"""What JSON holds: None, bool, int, float, str, or a list of them."""


@dataclass(frozen=True)
class Float:
    """Real numbers from `low` to `high`, both included; evenly likely, or evenly likely in their logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))

    def problems(self) -> list[str]:
        """What is wrong with the range, a sentence each; empty for a sound one."""
        return _range_problems(self.low, self.high, self.log)

    def contains(self, value: Value) -> bool:
        return _is_number(value) and self.low <= value <= self.high

    def sample(self, rng: Random) -> float:
        low, high = self._scaled()
        return self._clamped(self._unscaled(low + (high - low) * rng.random()))

    def grid(self, points: int) -> tuple[float, ...]:
        """`points` values from low to high in even steps (of the logarithm under `log`); the middle for one."""
        low, high = self._scaled()
        # 12 digits: 0.001 instead of 0.0010000000000000002, without touching the ends
        inner = [self._clamped(float(f"{self._unscaled(low + (high - low) * at):.12g}")) for at in _fractions(points)]
        ends = [self.low, *inner[1:-1], self.high] if points > 1 else inner
        return tuple(dict.fromkeys(ends))

    def describe(self) -> str:
        return f"{'log ' if self.log else ''}{self.low!r} .. {self.high!r}"

    def _scaled(self) -> tuple[float, float]:
        return (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)

    def _unscaled(self, value: float) -> float:
        return math.exp(value) if self.log else value

    def _clamped(self, value: float) -> float:
        return min(self.high, max(self.low, value))


@dataclass(frozen=True)
class Int:
    """Whole numbers low, low + step, ... up to `high`; evenly likely, or (step 1) evenly likely in their logarithm."""

    low: int
    high: int
    log: bool = False
    step: int = 1

    def __post_init__(self) -> None:
        assert all(type(value) is int for value in (self.low, self.high, self.step)), self

    def problems(self) -> list[str]:
        """What is wrong with the range, a sentence each; empty for a sound one."""
        found = _range_problems(self.low, self.high, self.log)
        if self.step < 1:
            found.append(f"the step ({self.step}) must be at least 1.")
        elif self.low < self.high and self.step > self.high - self.low:
            found.append(
                f"the step ({self.step}) is larger than the range {self.low} .. {self.high}, "
                f"which leaves {self.low} alone."
            )
        if self.log and self.step != 1:
            found.append(f"a logarithmic range has no step (got {self.step}): list the values with choice(...).")
        return found

    def contains(self, value: Value) -> bool:
        whole = _is_number(value) and value == math.floor(value)
        return whole and self.low <= value <= self.high and (int(value) - self.low) % self.step == 0

    def sample(self, rng: Random) -> int:
        if not self.log:
            return rng.randrange(self.low, self.high + 1, self.step)
        # half a unit on both sides, so that the ends are as likely as their share of the logarithm
        low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
        return min(self.high, max(self.low, round(math.exp(low + (high - low) * rng.random()))))

    def grid(self, points: int) -> tuple[int, ...]:
        """At most `points` values from the first to the last, evenly apart (in the logarithm under `log`)."""
        last = self.low + (self.high - self.low) // self.step * self.step
        if self.log:
            low, high = math.log(self.low), math.log(last)
            values = [min(last, max(self.low, round(math.exp(low + (high - low) * at)))) for at in _fractions(points)]
        else:
            count = (last - self.low) // self.step
            values = [self.low + self.step * _at(count, index, points) for index in range(points)]
        return tuple(dict.fromkeys(values))

    def describe(self) -> str:
        steps = f" step {self.step}" if self.step != 1 else ""
        return f"{'log ' if self.log else ''}{self.low} .. {self.high}{steps}"


@dataclass(frozen=True)
class Choice:
    """One of the listed values, each as likely; a value is a scalar or a list (`optim.betas`)."""

    options: tuple[Value, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(frozen(option) for option in self.options))

    @property
    def values(self) -> list[Value]:
        """The options as JSON holds them, lists for lists."""
        return [plain(option) for option in self.options]

    def problems(self) -> list[str]:
        """What is wrong with the options, a sentence each; empty for a sound choice."""
        if not self.options:
            return ["nothing to choose from: write choice(8, 16, 32)."]
        found = [
            f"{plain(option)!r} stands in the choice twice."
            for index, option in enumerate(self.options)
            if any(same(option, before) for before in self.options[:index])
        ]
        found += [f"{plain(option)!r} is no number." for option in self.options if not _is_finite(option)]
        if len(self.options) == 1:
            found.append(
                f"a choice of one value ({plain(self.options[0])!r}) is no search: set it as an override instead."
            )
        return found

    def contains(self, value: Value) -> bool:
        return any(same(value, option) for option in self.options)

    def sample(self, rng: Random) -> Value:
        return plain(self.options[rng.randrange(len(self.options))])

    def grid(self, points: int) -> tuple[Value, ...]:
        """Every option, however many points are asked for: they have no order to thin out."""
        return tuple(self.values)

    def describe(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


Domain: TypeAlias = Float | Int | Choice


def same(one: Value, other: Value) -> bool:
    """Whether two values mean the same in a configuration: 1 and 1.0 do, 1 and true do not, (1, 2) and [1, 2] do."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _range_problems(low: float, high: float, log: bool) -> list[str]:
    if not (math.isfinite(low) and math.isfinite(high)):
        return [f"the ends of a range must be finite numbers, got {low} and {high}."]
    found = []
    if low > high:
        found.append(f"low ({low}) is above high ({high}): swap them.")
    if low == high:
        found.append(f"low and high are both {low}, which is no search: set it as an override instead.")
    if log and min(low, high) <= 0:
        found.append(f"a logarithmic range must start above 0, and this one reaches down to {min(low, high)}.")
    return found


def _is_number(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_finite(option: Value) -> bool:
    if isinstance(option, tuple):
        return all(_is_finite(item) for item in option)
    return not isinstance(option, float) or math.isfinite(option)


def _fractions(points: int) -> list[float]:
    assert points >= 1
    return [index / (points - 1) for index in range(points)] if points > 1 else [0.5]


def _at(count: int, index: int, points: int) -> int:
    """Which of count + 1 steps is nearest to the index-th of so many even points; in whole numbers, so exact."""
    assert points >= 1
    return (2 * index * count + points - 1) // (2 * (points - 1)) if points > 1 else count // 2


def frozen(option: Value) -> Value:
    """A value as a dataclass keeps it: tuples for lists."""
    return tuple(frozen(item) for item in option) if isinstance(option, (list, tuple)) else option


def plain(option: Value) -> Value:
    """A value as JSON holds it: lists for tuples, new ones each time."""
    return [plain(item) for item in option] if isinstance(option, tuple) else option
