"""What is asked next is a function of the settings, the space and the history."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from orchestrator.sweeps.history import PENALTY, Ending, Event, History, Params, Seen
from orchestrator.sweeps.searchers import RandomSearcher, Searcher, build_searcher, told, trials_and_points
from orchestrator.sweeps.settings import Objective, SweepSettings
from orchestrator.sweeps.tpe import TPESearcher
from search_spaces.space import Axis, Choice, Float, Int, Space, When
from tests.orchestrator.histories import (
    BUDGET,
    CONDITIONAL,
    FINITE,
    SPACE,
    TWO,
    asks,
    complete,
    from_lines,
    go_on,
    lines,
    loss,
    mixed_end,
    same_history,
    settings,
)

ROOT = Path(__file__).resolve().parents[2]


def searcher_of(name: str, space: Space, seed: int = 0, trials: int = 20) -> Searcher:
    objectives = TWO if name == "multi" else TWO[:1]
    return build_searcher(settings(space, searcher=name, seed=seed, trials=trials, objectives=objectives), space)


def ending(name: str) -> Callable[[History, int], None]:
    return lambda history, number: mixed_end(history, number, 2 if name == "multi" else 1)


# ---- the same history, the same ask ---------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("space", [SPACE, CONDITIONAL, FINITE], ids=["plain", "conditional", "finite"])
@pytest.mark.parametrize("name", ["grid", "random", "tpe", "multi"])
def test_a_history_cut_at_any_event_goes_on_as_the_whole_one_did(name: str, space: Space, at_once: int) -> None:
    trials, end = 12, ending(name)
    whole = go_on(searcher_of(name, space), History(), trials, at_once=at_once, end=end)
    assert len(whole.trials) == trials
    written = lines(whole)
    for count in range(len(written)):
        cut = go_on(searcher_of(name, space), from_lines(written[:count]), trials, at_once=at_once, end=end)
        assert same_history(cut, whole)
    if name != "grid":
        other = go_on(searcher_of(name, space, seed=1), History(), trials, at_once=at_once, end=end)
        assert asks(other) != asks(whole)


@pytest.mark.parametrize("name", ["tpe", "multi"])
def test_an_ending_that_is_withheld_changes_what_the_estimator_asks(name: str) -> None:
    history = go_on(searcher_of(name, SPACE), History(), 16, end=ending(name))
    asked = searcher_of(name, SPACE).ask(history)
    assert searcher_of(name, SPACE).ask(from_lines(lines(history))) == asked

    def without_the_end_of(number: int) -> History:
        cut = from_lines(lines(history))
        cut.trials[number].ending = None
        cut.events.remove(Event("ended", number))
        return cut

    changed = [searcher_of(name, SPACE).ask(without_the_end_of(number)) != asked for number in history.trials]
    assert any(changed)
    # Negative control: a random draw does not look at endings.
    draw = searcher_of("random", SPACE).ask(history)
    assert all(searcher_of("random", SPACE).ask(without_the_end_of(n)) == draw for n in history.trials)


def test_running_trials_push_the_estimator_away() -> None:
    space = Space((Axis("optim.lr", Float(1e-5, 1e-1, log=True)),))

    def near_the_best(running_lr: float) -> int:
        history = History()
        for number in range(20):
            history.ask(number, {"optim.lr": 10 ** (-5 + number / 5)})
            complete(history, number)
        for number in range(20, 26):
            history.ask(number, {"optim.lr": running_lr})
        asked = [searcher_of("tpe", space, seed).ask(history) for seed in range(20)]
        return sum(1e-3 < params["optim.lr"] < 4e-3 for params in asked if params is not None)

    assert near_the_best(2e-3) < near_the_best(1e-5) / 2


def test_one_searcher_may_be_asked_about_several_histories() -> None:
    for name in ("random", "tpe"):
        one, other = (go_on(searcher_of(name, FINITE, seed), History(), 8) for seed in (0, 1))
        searcher = searcher_of(name, FINITE)
        assert [searcher.ask(history) for history in (one, other, one)] == [
            searcher_of(name, FINITE).ask(history) for history in (one, other, one)
        ]


FRESH = """
import json, sys
from tests.orchestrator.test_searchers import go_on, searcher_of, ending, asks, History, CONDITIONAL
print(json.dumps(asks(go_on(searcher_of(sys.argv[1], CONDITIONAL), History(), 18, at_once=2, end=ending(sys.argv[1])))))
"""


@pytest.mark.parametrize("name", ["random", "tpe", "multi"])
def test_a_fresh_process_asks_the_same_bits(name: str) -> None:
    whole = asks(go_on(searcher_of(name, CONDITIONAL), History(), 18, at_once=2, end=ending(name)))
    for hash_seed in ("0", "1"):
        result = subprocess.run(
            [sys.executable, "-c", FRESH, name],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(result.stdout) == whole
        assert result.stderr == ""  # Optuna's log lines and warnings


# ---- what is asked --------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [SPACE, CONDITIONAL, FINITE], ids=["plain", "conditional", "finite"])
@pytest.mark.parametrize("name", ["grid", "random", "tpe", "multi"])
def test_every_point_is_one_of_the_space_in_plain_json(name: str, space: Space) -> None:
    for params in asks(go_on(searcher_of(name, space), History(), 18, end=ending(name))):
        assert space.holds(params)
        assert json.loads(json.dumps(params)) == params


def test_the_grid_comes_in_order_and_ends() -> None:
    cells = list(SPACE.grid(3))
    assert asks(go_on(searcher_of("grid", SPACE, trials=1000), History(), 1000)) == cells
    assert asks(go_on(searcher_of("grid", SPACE, trials=7), History(), 1000)) == cells[:7]


def test_a_sweep_smaller_than_its_grid_is_told_so() -> None:
    """Its trials lie in one corner: the last axis alone has changed."""
    cells = len(list(SPACE.grid(3)))
    asked = settings(SPACE, searcher="grid", trials=3)
    said = trials_and_points(asked, SPACE)
    assert said is not None and f"the grid has {cells} cells" in said and "--trials 3 takes the first 3" in said
    corner = asks(go_on(build_searcher(asked, SPACE), History(), 3))
    assert {len({str(point[path]) for point in corner}) for path in list(SPACE)[:-1]} == {1}
    assert f"{list(SPACE)[-1]} fastest" in said and f"--trials {cells} for the whole" in said
    # Negative controls: the whole grid, and searchers that choose from all of the space.
    assert trials_and_points(settings(SPACE, searcher="grid", trials=cells), SPACE) is None
    assert trials_and_points(settings(SPACE, searcher="random", trials=3), SPACE) is None
    larger = trials_and_points(settings(SPACE, searcher="grid", trials=cells + 1), SPACE)
    assert larger == f"the grid has {cells} cells: of --trials {cells + 1}, no more are trained"


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_more_trials_than_points_are_told_before_they_begin(name: str) -> None:
    points = len(list(FINITE.grid(5)))
    said = trials_and_points(settings(FINITE, searcher=name, trials=points + 1), FINITE)
    assert said == f"the space has {points} points: of --trials {points + 1}, no more are trained"
    # Negative controls: as many as there are, and a space with a continuous axis.
    assert trials_and_points(settings(FINITE, searcher=name, trials=points), FINITE) is None
    assert trials_and_points(settings(SPACE, searcher=name, trials=1000), SPACE) is None


@pytest.mark.parametrize("name", ["random", "tpe", "multi"])
def test_a_finite_space_is_asked_for_once_and_whole(name: str) -> None:
    found = asks(go_on(searcher_of(name, FINITE), History(), 1000, end=ending(name)))
    assert sorted(map(str, found)) == sorted(map(str, FINITE.grid(5)))
    assert found != list(FINITE.grid(5))


def test_a_large_range_of_whole_numbers_is_finite_too() -> None:
    space = Space((Axis("a", Int(1, 200, log=True)), Axis("b", Choice((0, 1)))))
    found = asks(go_on(RandomSearcher(space, 0), History(), 10**6))
    assert len(found) == len({str(point) for point in found}) == 400


def test_a_branch_without_continuous_axes_repeats_rather_than_ends() -> None:
    space = Space((Axis("a", Choice((0, 1))), Axis("b", Float(0, 1), When("a", (1,)))))
    for name in ("random", "tpe"):
        found = asks(go_on(searcher_of(name, space), History(), 30))
        assert len(found) == 30
        assert [point["a"] for point in found].count(0) == 1


# ---- what the estimator is told -------------------------------------------------------------------------


def test_nothing_but_finite_numbers_reaches_optuna() -> None:
    values = (math.nan, math.inf, -math.inf, 1e308, 1.0)
    reasons = ("completed", "asha", "nonfinite", "oom", "error", "user")
    for name in ("tpe", "multi"):
        searcher, history = searcher_of(name, SPACE), History()
        for value in values:
            for reason in reasons:
                number = len(history.trials)
                history.ask(number, searcher_of("random", SPACE).ask(history))  # type: ignore[arg-type]
                count = 2 if name == "multi" else 1
                history.see(number, Seen(100, (value,) * count))
                history.end(number, Ending(reason, (value,) * count, 100, 1.0))  # type: ignore[arg-type]
        assert searcher.ask(history) is not None
        assert isinstance(searcher, TPESearcher)
        trials = [trial for trial in searcher._study._study.trials if trial.state.name != "FAIL"]
        assert len(trials) == len(values) * len(reasons)
        assert all(math.isfinite(value) for trial in trials for value in trial.values)
        assert all(math.isfinite(value) for trial in trials for value in trial.intermediate_values.values())
    # Negative control: Optuna would not have taken them.
    study = optuna.create_study()
    with pytest.raises(ValueError, match="nan is not acceptable"):
        study.tell(study.ask(), math.nan, state=optuna.trial.TrialState.COMPLETE)


def test_a_trial_without_an_objective_is_told_as_the_worst() -> None:
    down, up = Objective(), Objective(metric="val/accuracy", mode="max")
    assert told((down, up), Ending("completed", (1.0, 2.0), 1, 0.0)) == (1.0, 2.0)
    assert told((down, up), Ending("completed", (math.nan, 2.0), 1, 0.0)) == (PENALTY, 2.0)
    assert told((down, up), Ending("nonfinite", (1.0, 2.0), 1, 0.0)) == (PENALTY, -PENALTY)
    assert told((down, up), Ending("oom", (), 1, 0.0)) == (PENALTY, -PENALTY)


def test_nothing_is_told_as_worse_than_a_failure() -> None:
    """Of several objectives a failed trial would else dominate one that has an enormous perplexity."""
    down, up = Objective(metric="val/perplexity"), Objective(metric="perf/tokens_per_s", mode="max")
    failed = told((down, up), Ending("error", (), 1, 0.0))
    for perplexity, speed in ((4e8, 2e6), (1e300, 0.0), (1.0, 1e12)):
        found = told((down, up), Ending("completed", (perplexity, speed), 1, 0.0))
        assert found[0] <= failed[0] and found[1] >= failed[1] and all(map(math.isfinite, found))
    assert told((down, up), Ending("completed", (4e8, 2e6), 1, 0.0)) == (4e8, 2e6)
    assert not told((down,), Ending("completed", (4e8,), 1, 0.0))[0] <= 1e6  # the control: a penalty within reach


def lrs_after(reason: str, searcher_space: Space) -> list[float]:
    """Learning rates asked for when high ones ended in `reason` with a penalty and low ones were stopped by a rule."""
    history = History()
    for number in range(12):
        high = number % 2 == 0
        lr = 10 ** (-1.5 - number / 20) if high else 10 ** (-4 - number / 20)
        history.ask(number, {"optim.lr": lr})
        history.see(number, Seen(100, (PENALTY if high else 1 + number / 10,)))
        values = history.trials[number].seen[-1].values
        history.end(number, Ending(reason if high else "asha", values, 100, 1.0))  # type: ignore[arg-type]
    found: list[float] = []
    for seed in range(20):
        params = searcher_of("tpe", searcher_space, seed).ask(history)
        assert params is not None
        found.append(params["optim.lr"])
    return found


def test_a_failed_trial_ranks_behind_every_stopped_one() -> None:
    space = Space((Axis("optim.lr", Float(1e-5, 1e-1, log=True)),))
    assert sum(lr < 1e-3 for lr in lrs_after("nonfinite", space)) >= 18
    # Negative control: told as completed, however large its penalty, it ranks before them.
    assert sum(lr < 1e-3 for lr in lrs_after("completed", space)) <= 5


def best_of(name: str, seed: int, trials: int = 40) -> float:
    history = go_on(searcher_of(name, SPACE, seed, trials), History(), trials, end=complete)
    return min(loss(params) for params in asks(history))


def test_the_estimator_beats_random_search() -> None:
    def wins(one: list[float], other: list[float]) -> int:
        return sum(a < b for a, b in zip(one, other, strict=True))

    tpe = [best_of("tpe", seed) for seed in range(10)]
    random = [best_of("random", seed) for seed in range(10)]
    assert wins(tpe, random) >= 9
    assert sorted(tpe)[5] < sorted(random)[5] / 3
    # Negative control: random search does not beat itself.
    again = [best_of("random", seed + 100) for seed in range(10)]
    assert 2 <= wins(again, random) <= 8
    assert not sorted(again)[5] < sorted(random)[5] / 3


def test_several_objectives_go_their_own_ways() -> None:
    """The first is best at lr 2e-3, the second at 1e-1 or (its mode turned) at 1e-5."""

    def high_share(objectives: tuple[Objective, ...]) -> float:
        chosen: SweepSettings = settings(searcher="multi", objectives=objectives, trials=50)
        history = go_on(
            build_searcher(chosen, SPACE), History(), 50, end=lambda history, number: complete(history, number, 2)
        )
        later: list[Params] = asks(history)[20:]
        return sum(params["optim.lr"] > 1.5e-3 for params in later) / len(later)

    assert high_share(TWO) > 0.7
    assert high_share((TWO[0], TWO[1].model_copy(update={"mode": "min"}))) < 0.3


# ---- the cost of an ask ---------------------------------------------------------------------------------


def calls_of(action: Callable[[], object]) -> int:
    """Python and C functions called."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("name", ["grid", "random"])
def test_an_ask_costs_the_same_after_a_thousand_trials(name: str) -> None:
    space = Space(tuple(Axis(f"a{index}", Float(0, 1)) for index in range(7)))
    remembering, history = searcher_of(name, space, trials=1000), History()
    costs, forgetting = [], []
    for number in range(1000):
        if number in (20, 990):
            forgetting.append(calls_of(lambda: searcher_of(name, space, trials=1000).ask(history)))
        found: list[Params] = []
        costs.append(calls_of(lambda found=found: found.append(remembering.ask(history))))  # type: ignore[misc]
        history.ask(number, found[0])
        history.end(number, Ending("completed", (1.0,), BUDGET, 0.0))
    assert sum(costs[-50:]) <= 1.1 * sum(costs[10:60])
    if name == "random":
        # Negative control: one that reads the whole history each time.
        assert forgetting[1] > 5 * forgetting[0]
