"""A task on which the learning rate must fall: a population finds that out, and no constant rate can.

Plain SGD on one short row a step: a high rate learns fast and then wavers far above what the text allows, a low one
comes near to it and not in time. Real trainings in this process, without Tune and MLflow (inline_sweeps.py).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

import trainers.run
from orchestrator.sweeps.desk import TrialDesk
from orchestrator.sweeps.history import Exploit, History, seed_names
from orchestrator.sweeps.journal import JOURNAL
from search_spaces.space import Axis, Float, Space
from tests.orchestrator.inline_sweeps import Inline
from tests.trainers.small_runs import WORDS, config_for
from trainers.checkpoint import CheckpointStore
from trainers.config import RunConfig

MEMBERS, ROUNDS, STEPS, SEED = 8, 8, 240, 1
RATES = Space((Axis("optim.lr", Float(0.01, 3.0, log=True)),))
CONSTANT = 9
"""rates of the grid, a factor of two apart"""
MARGIN = 0.05
"""nats; over 4 seeds and 8 or 12 rounds the population was 0.015 to 0.156 better than the best rate of the grid"""


def words(folder: Path, schedule: str = "constant") -> RunConfig:
    """Words in no order, by their letters: a model of one narrow layer, and one row of 16 letters a step."""
    folder.mkdir()
    draws, text = Random(0), folder / "words.txt"
    text.write_text(" ".join(draws.choice(WORDS) for _ in range(6000)))
    return config_for(
        text,
        model={"d_model": 16, "n_layers": 1, "n_heads": 2, "context_length": 16, "dropout": 0.0},
        batch={"sequences": 1, "micro_sequences": 1},
        budget={"steps": STEPS},
        optim={"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": None},
        schedule={"kind": schedule, "warmup_steps": 0},
        evaluation={"every_steps": 50, "every_epochs": None, "max_tokens": 1024},
        logging={"every_steps": 50},
    )


def grid_of(folder: Path, schedule: str) -> dict[float, float]:
    """Rate -> loss of trainings that begin with each rate of the grid."""
    sweep = Inline(folder, RATES, base=words(folder, schedule), searcher="grid", grid_points=CONSTANT, trials=CONSTANT)
    trials = sweep.play().history.trials.values()
    return {trial.params["optim.lr"]: trial.ending.values[0] for trial in trials if trial.ending is not None}


def best_loss(history: History) -> float:
    return min(trial.ending.values[0] for trial in history.trials.values() if trial.ending is not None)


def first_rate(sweep: Inline, number: int) -> float:
    """The rate that a member was asked for with."""
    events = map(json.loads, (sweep.folder / JOURNAL).read_text().splitlines())
    return next(each["params"]["optim.lr"] for each in events if (each["event"], each["trial"]) == ("asked", number))


def rates_of_weights(sweep: Inline, history: History, number: int, before: float = float("inf")) -> list[float]:
    """The rates that a member's weights have been trained with, through all whose checkpoints they came from."""
    taken = [exploit for exploit in history.trials[number].lineage if exploit.tokens < before]
    if not taken:
        return [first_rate(sweep, number)]
    last = taken[-1]
    return [*rates_of_weights(sweep, history, last.parent, last.tokens), last.params["optim.lr"]]


def digest(tensors: dict[str, Any]) -> str:
    """Of all weights, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class TakeOver:
    exploit: Exploit
    parents: str
    """digest of the weights in the parent's checkpoint"""
    own: str
    """in the member's own, of the same round"""
    first: tuple[int, str]
    """tokens and weights with which the member then took its first step"""


@dataclass(frozen=True)
class Played:
    sweep: Inline
    desk: TrialDesk
    taken: list[TakeOver]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """The population, trained once for all that is said of it."""
    folder = tmp_path_factory.mktemp("falling") / "population"
    sweep = Inline(folder, RATES, base=words(folder), scheduler="pbt", trials=MEMBERS, evaluations=ROUNDS, seed=SEED)
    saved: dict[str, tuple[Exploit, str, str]] = {}
    begun: dict[str, tuple[int, str]] = {}
    restore = trainers.run.Run.restore

    def saved_by(number: int, history: History) -> str:
        place = sweep.folder / seed_names(number, 1, len(history.trials[number].lineage))[0]
        newest = CheckpointStore(place / "checkpoints", None).latest()
        return digest(newest.load("model")) if newest else "nothing"

    def note(exploit: Exploit, history: History) -> None:
        child = seed_names(exploit.trial, 1, len(history.trials[exploit.trial].lineage) + 1)[0]
        saved[child] = (exploit, saved_by(exploit.parent, history), saved_by(exploit.trial, history))

    def remember(self: trainers.run.Run) -> None:
        restore(self)
        begun.setdefault(self.ctx.run_dir.name, (self.progress.tokens, digest(self.engine.tensors()["model"])))

    sweep.before_taking_over = note
    with pytest.MonkeyPatch.context() as watched:
        watched.setattr(trainers.run.Run, "restore", remember)
        desk = sweep.play()
    return Played(sweep, desk, [TakeOver(*saved[child], begun[child]) for child in saved])


def test_who_takes_over_begins_with_the_weights_of_its_parents_checkpoint(played: Played) -> None:
    """And not with its own, which are other weights."""
    assert played.taken, "nobody took over: nothing was shown"
    for each in played.taken:
        assert each.first == (each.exploit.tokens, each.parents)
        assert each.parents not in (each.own, "nothing")


def test_the_weights_that_won_were_trained_at_a_rate_that_fell(played: Played) -> None:
    winner = played.desk.best()
    assert winner is not None
    rates = rates_of_weights(played.sweep, played.desk.history, winner.number)
    assert len(rates) > 1 and rates[-1] < rates[0] / 2, rates


@pytest.mark.slow
def test_no_constant_rate_is_as_good(played: Played, tmp_path: Path) -> None:
    """Not the best of a grid, nor, the control, the same members left to themselves."""
    constant = grid_of(tmp_path / "grid", "constant")
    best = min(constant, key=lambda rate: constant[rate])
    assert min(constant) < best < max(constant), "the best rate lies beyond the grid"
    assert best_loss(played.desk.history) < constant[best] - MARGIN
    alone = Inline(tmp_path / "alone", RATES, base=words(tmp_path / "alone"), trials=MEMBERS, seed=SEED).play().history
    firsts = [first_rate(played.sweep, number) for number in played.desk.history.trials]
    assert [trial.params["optim.lr"] for trial in alone.trials.values()] == firsts
    assert not best_loss(alone) < constant[best] - MARGIN


@pytest.mark.slow
def test_the_rate_must_fall(tmp_path: Path) -> None:
    """What the above rests on: a rate that falls by plan beats every constant one too."""
    constant, falling = (grid_of(tmp_path / kind, kind) for kind in ("constant", "linear"))
    assert min(falling.values()) < min(constant.values()) - MARGIN
