"""History: what a sweep has asked, seen and ended, in the order in which it happened.

Everything that decides (searchers, early stopping) is a function of the history alone, so a sweep whose driver was
killed decides as it would have decided. The journal (`journal.py`) is its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Params = dict[str, Any]
"""dotted config path (or a virtual axis of search_spaces) -> value"""

StopReason = Literal["completed", "asha", "hyperband", "median", "nonfinite", "oom", "budget", "user", "error"]
RESUMABLE: frozenset[str] = frozenset({"budget", "user"})
"""reasons after which a trial goes on when the sweep does; every other ending is final"""
FAILED: frozenset[str] = frozenset({"nonfinite", "oom", "error"})
"""reasons after which a trial has no objective"""
PENALTY = 1e30
"""the objective of a trial that has none (non-finite, out of memory, failed), in the worse direction: beyond any speed
or perplexity that says something, and squares of it are still finite"""


@dataclass(frozen=True)
class Seen:
    """One evaluation of a trial, the mean over its seeds."""

    tokens: int
    values: tuple[float, ...]
    """one for each objective of the sweep, the first of which early stopping judges"""
    spread: float = 0.0
    """standard deviation of the first value over the seeds (n - 1), 0 for one seed"""


@dataclass(frozen=True)
class Ending:
    reason: StopReason
    values: tuple[float, ...]
    """what the searcher is told: the last evaluation, or penalties"""
    tokens: int
    train_s: float
    """seconds inside train(), over all seeds"""
    message: str = ""
    """what went wrong, in a sentence"""


@dataclass(frozen=True)
class Exploit:
    """A member of a population goes on from another's checkpoint, with other settings."""

    trial: int
    parent: int
    tokens: int
    """at which both stood"""
    params: Params


@dataclass
class Trial:
    """A point of the space that is trained, with as many seeds as the sweep asks for."""

    number: int
    params: Params
    seen: list[Seen] = field(default_factory=list)
    """in the order of tokens; each count of tokens once"""
    stop: StopReason | None = None
    """why the last of `seen` is where it is to stop; only a population's member goes on from there"""
    ending: Ending | None = None
    """None while it runs, waits, or can go on"""
    train_s: float = 0.0
    """seconds inside train() before it was interrupted or rested; those since are not in it"""
    began: Params = field(default_factory=dict)
    """the params it was asked for with: those of a population's member change"""
    lineage: list[Exploit] = field(default_factory=list)
    """what it took over from other members of its population; each begins a folder of its own"""

    @property
    def name(self) -> str:
        return trial_name(self.number)

    def at(self, tokens: int) -> Seen | None:
        """The first evaluation at or after so many tokens."""
        return next((seen for seen in self.seen if seen.tokens >= tokens), None)


@dataclass(frozen=True)
class Event:
    """Something that happened, as searchers replay it: a trial was asked for, or it ended for good."""

    kind: Literal["asked", "ended"]
    trial: int


class History:
    """The trials by number, and the order in which they were asked for and ended."""

    def __init__(self) -> None:
        self.trials: dict[int, Trial] = {}
        self.events: list[Event] = []
        self.rounds = 0
        """after how many rounds of a population it has been decided who takes over from whom"""

    def ask(self, number: int, params: Params) -> Trial:
        assert number not in self.trials
        self.trials[number] = trial = Trial(number, params, began=params)
        self.events.append(Event("asked", number))
        return trial

    def see(self, number: int, seen: Seen) -> bool:
        """Take in an evaluation; False where one of so many tokens stands already (a replayed one)."""
        known = self.trials[number].seen
        if known and seen.tokens <= known[-1].tokens:
            return False
        known.append(seen)
        return True

    def end(self, number: int, ending: Ending) -> None:
        trial = self.trials[number]
        assert trial.ending is None, f"{trial.name} ended twice"
        trial.ending = ending
        self.events.append(Event("ended", number))

    def exploit(self, exploit: Exploit) -> None:
        trial = self.trials[exploit.trial]
        trial.lineage.append(exploit)
        trial.params = exploit.params
        trial.stop = None

    def unfinished(self) -> Iterator[Trial]:
        """Asked for and not ended for good, in the order of their numbers."""
        return (trial for number, trial in sorted(self.trials.items()) if trial.ending is None)

    def ended(self) -> Iterator[Trial]:
        return (trial for _, trial in sorted(self.trials.items()) if trial.ending is not None)


def trial_name(number: int) -> str:
    """`t0007`."""
    return f"t{number:04d}"


def seed_names(number: int, seeds: int, segment: int = 0) -> list[str]:
    """The folders of a trial's trainings: `t0007`; `t0007-s0`, `t0007-s1` ... where a point has several seeds;
    `t0007-x2` for what followed the second take-over of a member of a population."""
    name = trial_name(number) + (f"-x{segment}" if segment else "")
    return [name] if seeds == 1 else [f"{name}-s{index}" for index in range(seeds)]
