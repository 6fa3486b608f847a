"""Laws of population based training: what is taken over is the parent's very state, and a function of the history."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trainers.run
from orchestrator.sweeps.history import Ending, Exploit, History, Seen, seed_names
from orchestrator.sweeps.journal import JOURNAL, read_history
from orchestrator.sweeps.population import Population, check_population, perturbed
from orchestrator.sweeps.settings import SweepSettings
from search_spaces.space import Axis, Choice, Float, Int, Space, When
from tests.orchestrator.histories import CONDITIONAL, SPACE, same_history
from tests.orchestrator.inline_sweeps import RATES, Inline, play_with_cuts
from trainers.checkpoint import CheckpointStore
from trainers.errors import ConfigError

TOKENS, ROUNDS = 900, 3


def population_of(trials: int, space: Space = RATES, seed: int = 0) -> Population:
    values = {"space": space.to_json(), "trials": trials, "tokens": TOKENS, "evaluations": ROUNDS, "seed": seed}
    return Population(SweepSettings.model_validate({**values, "searcher": "random", "scheduler": "pbt"}), space)


def standing(losses: list[float], rate: float = 1e-3) -> History:
    """Members after their first round; NaN was seen as such."""
    history = History()
    for number, loss in enumerate(losses):
        history.ask(number, {"optim.lr": rate * (1 + number)})
        history.see(number, Seen(300, (loss,)))
    return history


# ---- who takes over from whom --------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 10), min_size=4, max_size=16, unique=True), st.integers(0, 5))
def test_the_worst_quarter_goes_on_from_the_best(losses: list[float], seed: int) -> None:
    population, history = population_of(len(losses), seed=seed), standing(losses)
    exploits = population.exploits(history, 1)
    quarter = max(1, len(losses) // 4)
    order = sorted(range(len(losses)), key=lambda number: losses[number])
    assert sorted(each.trial for each in exploits) == sorted(order[-quarter:])
    assert {each.parent for each in exploits} <= set(order[:quarter])
    assert all(each.tokens == 300 and RATES.holds(each.params) for each in exploits)
    assert population.exploits(standing(losses), 1) == exploits
    assert population.exploits(history, ROUNDS) == []  # after the last round there is nothing left to train


def test_another_seed_takes_over_otherwise() -> None:
    """Negative control of the above."""
    history = standing([float(number) for number in range(16)])
    drawn = {json.dumps([e.params for e in population_of(16, seed=seed).exploits(history, 1)]) for seed in range(4)}
    assert len(drawn) == 4


def test_what_left_the_finite_numbers_is_rescued() -> None:
    """All of it, beyond the quarter; and nobody learns from it."""
    history = standing([math.nan, 2.0, math.inf, 1.0, 3.0, math.nan])
    exploits = population_of(6).exploits(history, 1)
    assert [each.trial for each in exploits] == [0, 2, 5]
    assert {each.parent for each in exploits} == {3}
    assert population_of(4).exploits(standing([math.nan] * 4), 1) == []


def test_a_member_that_ended_is_out_of_it() -> None:
    history = standing([1.0, 2.0, 3.0, 4.0, 5.0])
    history.end(4, Ending("error", (1e6,), 300, 1.0, "gone"))
    assert [each.trial for each in population_of(5).exploits(history, 1)] == [3]
    for number in range(1, 4):
        history.end(number, Ending("error", (1e6,), 300, 1.0, "gone"))
    assert population_of(5).exploits(history, 1) == []  # the last of them does not learn from itself


@given(st.sampled_from([SPACE, CONDITIONAL]), st.integers(0, 2**32))
def test_what_is_perturbed_stays_in_the_space(space: Space, seed: int) -> None:
    """Also where a condition comes true or ceases to."""
    draws = Random(seed)
    params = space.sample(draws)
    for _ in range(5):
        params = perturbed(space, params, draws)
        assert space.holds(params), params


def test_a_scaled_value_moves_by_a_fifth() -> None:
    space = Space((Axis("optim.lr", Float(1e-6, 1.0, log=True)), Axis("n", Int(0, 100, step=3)), Axis("c", Choice((1, 2, 3)))))  # fmt: skip # noqa: E501
    params: dict[str, Any] = {"optim.lr": 1e-3, "n": 50 // 3 * 3, "c": 2}
    ratios = {round(perturbed(space, params, Random(seed))["optim.lr"] / 1e-3, 6) for seed in range(40)}
    assert {0.8, 1.2} < ratios
    assert {perturbed(space, params, Random(seed))["c"] for seed in range(40)} >= {1, 3}
    assert space.holds(perturbed(space, {"optim.lr": 1.0, "n": 99, "c": 3}, Random(3)))


# ---- what can be refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "workers", "trials", "part"),
    [
        ("batch.sequences", 1, 8, "batch.sequences cannot change"),
        ("optim.name", 1, 8, "optim.name"),
        ("model.d_model", 1, 8, "model.d_model"),
        ("optim.lr", 2, 8, "--workers 1"),
        ("optim.lr", 1, 3, "at least 4"),
    ],
)
def test_what_cannot_change_in_training_is_refused(path: str, workers: int, trials: int, part: str) -> None:
    space = Space((Axis(path, Choice((1, 2))),))
    with pytest.raises(ConfigError, match=part):
        check_population(space, population_of(trials).settings, workers)


@pytest.mark.parametrize("path", ["optim.lr", "optim.betas", "schedule.warmup_steps", "model.dropout", "phases.a.optim.lr"])  # fmt: skip # noqa: E501
def test_what_can_change_is_taken(path: str) -> None:
    check_population(Space((Axis(path, Choice((1, 2))),)), population_of(4).settings, 1)


def test_a_condition_needs_its_axis() -> None:
    """The example above is one: `When` refers to an axis before it."""
    axis = Axis("schedule.warmup_steps", Int(1, 5), When("schedule.kind", ("cosine",)))
    assert perturbed(Space((axis,)), {}, Random(0)) == {}


# ---- in training ----------------------------------------------------------------------------------------------


def a_population(folder: Path, **settings: Any) -> Inline:
    return Inline(folder, scheduler="pbt", **{"trials": 4, **settings})


def weights(folder: Path, step: int) -> bytes:
    """The bits of a checkpoint's weights."""
    checkpoint = CheckpointStore(folder / "checkpoints", None).latest()
    assert checkpoint is not None and checkpoint.step == step
    return bits(checkpoint.load("model"))


def bits(tensors: dict[str, Any]) -> bytes:
    return b"".join(tensors[name].detach().contiguous().numpy().tobytes() for name in sorted(tensors))


def test_the_exploited_member_begins_with_its_parents_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files, and the same bits in the model before its first step, at the parent's step."""
    sweep = a_population(tmp_path)
    parents: dict[str, tuple[Exploit, bytes, str]] = {}
    loaded: dict[str, tuple[int, bytes]] = {}

    def note(exploit: Exploit, history: History) -> None:
        folder = sweep.folder / seed_names(exploit.parent, 1, len(history.trials[exploit.parent].lineage))[0]
        newest = max((folder / "checkpoints").glob("step-*"))
        child = seed_names(exploit.trial, 1, len(history.trials[exploit.trial].lineage) + 1)[0]
        state = weights(folder, int(newest.name.removeprefix("step-")))
        parents[child] = (exploit, state, (newest / "manifest.json").read_text())

    restore = trainers.run.Run.restore

    def remember(self: trainers.run.Run) -> None:
        restore(self)
        loaded.setdefault(self.ctx.run_dir.name, (self.progress.tokens, bits(self.engine.tensors()["model"])))

    sweep.before_taking_over = note
    monkeypatch.setattr(trainers.run.Run, "restore", remember)
    desk = sweep.play()
    assert parents, "nobody took over: nothing was shown"
    assert {trial.ending.reason for trial in desk.history.trials.values() if trial.ending} == {"completed"}
    for child, (exploit, state, _) in parents.items():
        assert loaded[child] == (exploit.tokens, state)
    assert len({state for _, state in loaded.values()}) > len(parents)  # and others began otherwise
    told = {name: reason for name, reason, _ in sweep.closed}
    assert set(told.values()) == {"exploited", "completed"}
    lineage = {exploit.trial for exploit, _, _ in parents.values()}
    assert all(desk.history.trials[number].params != read_first(sweep, number) for number in lineage)


def read_first(sweep: Inline, number: int) -> dict[str, Any]:
    """The settings that a member was first asked for with."""
    lines = (sweep.folder / JOURNAL).read_text().splitlines()
    return next(event["params"] for event in map(json.loads, lines) if (event["event"], event["trial"]) == ("asked", number))  # fmt: skip # noqa: E501


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inline, History]:
    """A population that nobody disturbed."""
    sweep = a_population(tmp_path_factory.mktemp("whole"))
    history = sweep.play().history
    assert any(trial.lineage for trial in history.trials.values())
    return sweep, history


CUTS = [pytest.param(cut, slots, marks=[] if cut in (2, 11) else [pytest.mark.slow]) for cut in range(1, 20) for slots in (1, 2)]  # fmt: skip # noqa: E501


@pytest.mark.parametrize(("cut", "slots"), CUTS)
def test_cut_anywhere_it_ends_as_it_would_have(
    cut: int, slots: int, whole: tuple[Inline, History], tmp_path: Path
) -> None:
    """The same exploits, settings and bits, wherever the driver was killed; members outnumber the slots or not."""
    reference, history = whole
    again = a_population(tmp_path, slots=slots)
    desk = play_with_cuts(again, [cut])
    assert same_lives(desk.history, history)
    for number in history.trials:
        assert again.left(number, desk.history).digest == reference.left(number, history).digest


def test_another_population_ends_otherwise(whole: tuple[Inline, History], tmp_path: Path) -> None:
    """Negative control of the above."""
    assert not same_lives(a_population(tmp_path, seed=1).play().history, whole[1])


def same_lives(one: History, other: History) -> bool:
    """Each member with the same settings, evaluations, exploits and end; the order between members may differ."""

    def lives(history: History) -> list[Any]:
        return [
            (t.params, t.seen, t.lineage, t.ending and (t.ending.reason, t.ending.values, t.ending.tokens))
            for _, t in sorted(history.trials.items())
        ]

    return repr(lives(one)) == repr(lives(other))


def test_the_journal_of_a_population_replays(tmp_path: Path) -> None:
    sweep = a_population(tmp_path)
    desk = sweep.play()
    assert same_history(read_history(sweep.folder / JOURNAL), desk.history)
    assert read_history(sweep.folder / JOURNAL).rounds == desk.history.rounds > 0


def test_a_member_that_diverges_goes_on_from_a_better_one(tmp_path: Path) -> None:
    space = Space((Axis("optim.lr", Choice((1e30, 1e-3))),))
    sweep = Inline(tmp_path, space, scheduler="pbt", trials=5, seed=3)
    desk = sweep.play()
    diverged = {name for name, reason, _ in sweep.closed if reason == "nonfinite"}
    assert diverged, "nobody diverged: nothing was shown"
    assert all(trial.ending is not None for trial in desk.history.trials.values())
    rescued = [trial for trial in desk.history.trials.values() if trial.name in diverged and trial.lineage]
    assert rescued and any(trial.seen and math.isfinite(trial.seen[-1].values[0]) for trial in rescued)
