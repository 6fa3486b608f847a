"""Small sweeps that happen in a History alone, for the laws of searchers, rules and the journal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from orchestrator.sweeps.history import PENALTY, Ending, History, Params, Seen
from orchestrator.sweeps.journal import replay
from orchestrator.sweeps.searchers import Searcher
from orchestrator.sweeps.settings import Objective, SweepSettings
from search_spaces.space import Axis, Choice, Float, Int, Space, When

BUDGET = 900
SPACE = Space(
    (
        Axis("optim.lr", Float(1e-5, 1e-1, log=True)),
        Axis("batch.sequences", Choice((8, 16, 32, 64))),
        Axis("model.dropout", Float(0.0, 0.5)),
    )
)
CONDITIONAL = Space(
    (
        Axis("optim.lr", Float(1e-5, 1e-1, log=True)),
        Axis("optim.betas", Choice(((0.9, 0.95), (0.9, 0.99), (0.8, 0.9)))),
        Axis("schedule.kind", Choice(("constant", "cosine", "wsd"))),
        Axis("schedule.warmup_steps", Int(1, 100, log=True), When("schedule.kind", ("cosine", "wsd"))),
        Axis("schedule.decay_steps", Int(10, 55, step=10), When("schedule.kind", ("wsd",))),
    )
)
"""lists for values, a step that does not divide its range, axes that do not always exist"""
FINITE = Space(
    (
        Axis("batch.sequences", Choice((8, 16, 32))),
        Axis("schedule.kind", Choice(("constant", "cosine"))),
        Axis("schedule.warmup_steps", Int(1, 5), When("schedule.kind", ("cosine",))),
    )
)
"""3 + 3 * 5 points"""
TWO = (Objective(metric="val/loss"), Objective(metric="perf/tokens_per_s", mode="max"))


def settings(space: Space = SPACE, **changes: Any) -> SweepSettings:
    return SweepSettings.model_validate({"space": space.to_json(), "trials": 20, "tokens": BUDGET, **changes})


def loss(params: Params) -> float:
    """Smooth, 0 at lr 2e-3, 16 sequences and dropout 0.1 where the space has them; the more warmup the worse."""
    return (
        (math.log10(params.get("optim.lr", 2e-3)) - math.log10(2e-3)) ** 2
        + 0.3 * abs(math.log2(params.get("batch.sequences", 16)) - 4)
        + 4 * (params.get("model.dropout", 0.1) - 0.1) ** 2
        + params.get("schedule.warmup_steps", 0) / 100
    )


def complete(history: History, number: int, objectives: int = 1) -> None:
    """The trial trains to its end; its second objective is best at the top learning rate."""
    params = history.trials[number].params
    values = (loss(params), math.log10(params.get("optim.lr", 1.0)))[:objectives]
    history.see(number, Seen(BUDGET, values))
    history.end(number, Ending("completed", values, BUDGET, 1.0))


def mixed_end(history: History, number: int, objectives: int = 1) -> None:
    """Every third trial is stopped on its way, every fifth has no finite loss, the others complete."""
    value = loss(history.trials[number].params)
    if number % 5 == 4:
        history.see(number, Seen(100, (math.nan, math.inf)[:objectives]))
        penalties = (PENALTY, -PENALTY)[:objectives]
        history.end(number, Ending("nonfinite", penalties, 100, 1.0, "the loss is nan"))
    elif number % 3 == 2:
        for tokens in (100, 300):
            history.see(number, Seen(tokens, (value + 1 / tokens, 0.0)[:objectives]))
        history.end(number, Ending("asha", (value + 1 / 300, 0.0)[:objectives], 300, 1.0))
    else:
        complete(history, number, objectives)


def go_on(
    searcher: Searcher,
    history: History,
    trials: int,
    *,
    at_once: int = 1,
    end: Callable[[History, int], None] = mixed_end,
) -> History:
    """Take a sweep to its end from wherever it stands: ask while fewer than `at_once` run, else end the oldest.

    What comes next follows from the history, so a cut sweep goes on as the whole one did.
    """
    while True:
        running = list(history.unfinished())
        params = None
        if len(history.trials) < trials and len(running) < at_once:
            params = searcher.ask(history)
        if params is not None:
            history.ask(len(history.trials), params)
        elif running:
            end(history, running[0].number)
        else:
            return history


def asks(history: History) -> list[Params]:
    return [trial.params for trial in history.trials.values()]


def lines(history: History) -> list[str]:
    """The history as a journal holds it: what a trial saw stands before its end."""
    written = []
    for event in history.events:
        trial = history.trials[event.trial]
        if event.kind == "asked":
            written.append(json.dumps({"event": "asked", "trial": trial.number, "params": trial.params}))
            continue
        assert trial.ending is not None
        written += [
            json.dumps({"event": "seen", "trial": trial.number, **asdict(seen), "stop": None}) for seen in trial.seen
        ]
        written.append(json.dumps({"event": "ended", "trial": trial.number, **asdict(trial.ending)}))
    return written


def from_lines(written: Iterable[str]) -> History:
    history = History()
    for line in written:
        replay(history, json.loads(line))
    return history


def same_history(one: History, other: History) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    return repr((one.trials, one.events)) == repr((other.trials, other.events))
