"""Check: one claim about what a GPU computes, and what became of it: pass, fail, or skipped with the reason."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.measure import Figure

if TYPE_CHECKING:
    from benchmarks.gpu_rig import Rig

Verdict = Literal["pass", "fail", "skipped"]
PATH = re.compile(r"(?<![\w/])(?:/[\w.@+~-]+){2,}")
LONGEST = 300  # characters of a reason


class Skipped(Exception):
    """The check cannot be made here; the message says why."""


@dataclass(frozen=True)
class Finding:
    """What became of one check."""

    name: str
    claim: str
    verdict: Verdict
    reason: str = ""
    """why it was skipped or failed"""
    figures: tuple[Figure, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Finding:
        return cls(**{**data, "figures": tuple(Figure(**figure) for figure in data["figures"])})


@dataclass(frozen=True)
class Check:
    """A function that measures some figures, all of which are to keep within their bars."""

    measure: Callable[[Rig], Sequence[Figure]]
    """its docstring's first line is the claim; raises Skipped"""

    @property
    def name(self) -> str:
        return self.measure.__name__

    @property
    def claim(self) -> str:
        return (self.measure.__doc__ or "").partition("\n")[0]

    def found(self, rig: Rig) -> Finding:
        """The finding; whatever the check raises is a failure and no accident."""
        began = time.perf_counter()
        figures: tuple[Figure, ...] = ()
        try:
            figures = tuple(self.measure(rig))
            missed = [figure.what for figure in figures if figure.verdict == "MISSED"]
            verdict: Verdict = "fail" if missed else "pass"
            reason = "; ".join(missed)
        except Skipped as skipped:
            verdict, reason = "skipped", str(skipped)
        except Exception as error:  # of any library: what a check comes upon is its result
            verdict, reason = "fail", told(error)
        return self.ended(verdict, reason, figures, time.perf_counter() - began)

    def ended(self, verdict: Verdict, reason: str, figures: tuple[Figure, ...] = (), seconds: float = 0.0) -> Finding:
        return Finding(self.name, self.claim, verdict, reason, figures, round(seconds, 2))


def told(error: BaseException) -> str:
    """What an error says and where it was raised, without anybody's folders."""
    said = str(error).strip().splitlines() or [""]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (at {frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return without_paths(f"{type(error).__name__}: {said[0][:LONGEST]}{where}")


def without_paths(text: str) -> str:
    """`text` with every absolute path cut down to its last part."""
    return PATH.sub(lambda path: path[0].rsplit("/", 1)[-1], text)
