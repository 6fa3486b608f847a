"""Who is stopped early: as Ray Tune's schedulers decide, and from the history alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.sweeps.history import Ending, History, Seen
from orchestrator.sweeps.journal import JOURNAL, Journal
from orchestrator.sweeps.rules import Asha, Hyperband, Median, NoRule, Rule, build_rule, rungs
from orchestrator.verbs.sweeps import SearchOptions, SpaceOptions, sought
from tests.orchestrator.histories import settings
from trainers.claim import Claim, Guard
from trainers.errors import ConfigError
from trainers.presets import preset

TRIALS, BUDGET, GRACE = 24, 900, 100
Report = tuple[int, Seen]
Stops = Callable[[int, Seen], bool]


def reports(seed: int, *, aligned: bool = True, running: int = 5) -> Iterator[Report]:
    """(trial, evaluation) of trials that run a few at a time; losses fall along the way, and many are equal.

    Aligned: every 100 tokens. Otherwise at random tokens, so that rungs are passed over.
    """
    rng = Random(seed)
    quality = [rng.choice((0, 1, 2, 3, 4, 8)) for _ in range(TRIALS)]
    at = [0] * TRIALS
    waiting = list(range(TRIALS))
    alive = [waiting.pop(0) for _ in range(running)]
    while alive:
        number = rng.choice(alive)
        at[number] += GRACE if aligned else rng.randint(1, 2 * GRACE)
        if at[number] >= BUDGET:
            alive.remove(number)
            alive += [waiting.pop(0)] if waiting else []
        else:
            loss = quality[number] + rng.choice((0, 0.5, 1)) + (BUDGET - at[number]) // GRACE
            yield number, Seen(at[number], (float(loss),))


def decisions(stops: Stops, seed: int, **options: Any) -> list[bool]:
    """What is decided on each report, in order; a stopped trial reports no more."""
    stopped: set[int] = set()
    decided = []
    for number, seen in reports(seed, **options):
        if number not in stopped:
            decided.append(stops(number, seen))
            stopped |= {number} if decided[-1] else set()
    return decided


def by_rule(rule: Rule, sign: float = 1.0) -> Stops:
    """The decisions of `rule`, over a history of its own."""
    history = History()

    def stops(number: int, seen: Seen) -> bool:
        seen = Seen(seen.tokens, (sign * seen.values[0],))
        for earlier in range(len(history.trials), number + 1):
            history.ask(earlier, {})
        assert history.see(number, seen)
        return rule.stops(history, number, seen) is not None

    return stops


def by_ray(scheduler: TrialScheduler, sign: float = 1.0, bracket: Callable[[int], int] | None = None) -> Stops:
    """The decisions of a scheduler of Ray Tune, without Ray: it looks at a trial's id and at the result."""
    trials: dict[int, Any] = {}
    controller: Any = SimpleNamespace(get_live_trials=list)

    def stops(number: int, seen: Seen) -> bool:
        if number not in trials:
            trials[number] = _StandIn(number)
            scheduler.on_trial_add(controller, trials[number])
            if bracket is not None:
                scheduler._trial_info[str(number)] = scheduler._brackets[bracket(number)]
        result = {"tokens": seen.tokens, "loss": sign * seen.values[0]}
        return bool(scheduler.on_trial_result(controller, trials[number], result) == TrialScheduler.STOP)

    return stops


class _StandIn:
    def __init__(self, number: int):
        self.trial_id = str(number)


def ray_asha(reduction: int, mode: str = "min", brackets: int = 1, **options: Any) -> AsyncHyperBandScheduler:
    chosen = {"max_t": BUDGET, "grace_period": GRACE, "reduction_factor": reduction, "brackets": brackets, **options}
    return AsyncHyperBandScheduler(time_attr="tokens", metric="loss", mode=mode, **chosen)


def asha(reduction: int, mode: str = "min") -> Asha:
    return Asha(rungs(GRACE, reduction, BUDGET), BUDGET, reduction, 1.0 if mode == "min" else -1.0)


def hyperband(reduction: int, seed: int = 0) -> Hyperband:
    return Hyperband(rungs(GRACE, reduction, BUDGET), BUDGET, reduction, 1.0, seed)


MEDIAN = Median(GRACE, BUDGET, 1.0)
RULES = [asha(3), hyperband(2), MEDIAN]


def ray_median(**options: Any) -> MedianStoppingRule:
    return MedianStoppingRule(time_attr="tokens", metric="loss", mode="min", grace_period=GRACE, **options)


# ---- parity with Ray Tune -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("reduction", [2, 3, 4])
def test_asha_stops_whom_ray_stops(reduction: int, mode: str) -> None:
    sign = 1.0 if mode == "min" else -1.0
    stopped = told_apart = 0
    for seed in range(20):
        found = decisions(by_rule(asha(reduction, mode), sign), seed)
        for stop_last in (False, True):
            ray = by_ray(ray_asha(reduction, mode, stop_last_trials=stop_last), sign)
            assert decisions(ray, seed) == found
        skipping = decisions(by_rule(asha(reduction, mode), sign), seed, aligned=False)
        ray = by_ray(ray_asha(reduction, mode, stop_last_trials=False), sign)
        assert decisions(ray, seed, aligned=False) == skipping
        stopped += sum(found) + sum(skipping)
        told_apart += decisions(by_rule(asha(reduction + 1, mode), sign), seed) != found
    assert stopped > 100
    assert told_apart >= 15  # negative control: another reduction decides otherwise


@pytest.mark.parametrize("reduction", [2, 3])
def test_hyperband_stops_whom_ray_stops_in_the_same_brackets(reduction: int) -> None:
    brackets = len(rungs(GRACE, reduction, BUDGET))
    rule = hyperband(reduction)
    stopped = told_apart = 0
    for seed in range(20):
        for aligned in (True, False):
            found = decisions(by_rule(rule), seed, aligned=aligned)
            scheduler = ray_asha(reduction, brackets=brackets, stop_last_trials=False)
            assert decisions(by_ray(scheduler, bracket=rule.bracket), seed, aligned=aligned) == found
            stopped += sum(found)
            told_apart += decisions(by_rule(hyperband(reduction, seed=1)), seed, aligned=aligned) != found
    assert stopped > 100
    assert told_apart >= 30  # negative control: other brackets


def test_the_brackets_have_rays_shares() -> None:
    rule = hyperband(2)  # rungs at 100, 200, 400, 800
    found = [rule.bracket(number) for number in range(4000)]
    weights = [math.exp(-bracket) for bracket in range(4)]
    for bracket, weight in enumerate(weights):
        assert abs(found.count(bracket) / 4000 - weight / sum(weights)) < 0.02
    assert found == [hyperband(2).bracket(number) for number in range(4000)]
    assert found != [hyperband(2, seed=1).bracket(number) for number in range(4000)]


def test_the_median_rule_stops_whom_ray_stops() -> None:
    stopped = told_apart = 0
    for seed in range(20):
        for aligned in (True, False):
            found = decisions(by_rule(MEDIAN), seed, aligned=aligned)
            assert decisions(by_ray(ray_median()), seed, aligned=aligned) == found
            stopped += sum(found)
            more_needed = by_ray(ray_median(min_samples_required=8))
            told_apart += decisions(more_needed, seed, aligned=aligned) != found
    assert stopped > 100
    assert told_apart >= 20  # negative control: a median of more trials decides otherwise


# ---- laws of their own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=["asha", "hyperband", "median"])
def test_a_bad_trial_is_stopped_and_the_best_never(rule: Rule) -> None:
    """Sixteen trials in order of quality at every evaluation: the first is the best throughout."""
    ends = []
    for seed in range(10):
        order = list(range(16))
        Random(seed).shuffle(order)
        stops = by_rule(rule)
        stopped: set[int] = set()
        for tokens in range(100, BUDGET, 100):
            for number in order:
                if number not in stopped and stops(number, Seen(tokens, (number + 10 - tokens / 100,))):
                    stopped.add(number)
        ends += stopped
    assert 0 not in ends
    worst, best = sum(number >= 12 for number in ends), sum(number < 4 for number in ends)
    assert worst >= 25  # of 40
    assert best <= worst / 2


@pytest.mark.parametrize("rule", RULES, ids=["asha", "hyperband", "median"])
def test_a_journal_that_is_read_again_decides_the_same(rule: Rule, tmp_path: Path) -> None:
    path, known = tmp_path / JOURNAL, list[tuple[int, int, Seen, str | None]]()
    with Claim.acquire(tmp_path) as claim:
        guard = Guard.begin_attempt(tmp_path, claim.generation)
        journal = Journal(path, guard)
        for number, seen in reports(0, aligned=False):
            for _ in range(len(journal.history.trials), number + 1):
                journal.ask({})
            if journal.history.trials[number].ending is None:
                journal.see(number, seen)
                reason = rule.stops(journal.history, number, seen)
                known.append((path.stat().st_size, number, seen, reason))
                if reason is not None:
                    journal.end(number, Ending(reason, seen.values, seen.tokens, 0.0))
        journal.close()
        assert 0 < sum(reason is not None for *_, reason in known) < len(known)
        differently = 0
        for size, number, seen, reason in known:
            (tmp_path / "cut.jsonl").write_bytes(path.read_bytes()[:size])
            history = Journal(tmp_path / "cut.jsonl", guard).history
            assert rule.stops(history, number, seen) == reason
            for other in set(history.trials) - {number}:
                history.trials[other].seen.clear()
            differently += rule.stops(history, number, seen) != reason
        assert differently > 5  # negative control: it is the others' evaluations that decide


def rung_history(rng: Random, others: list[float]) -> History:
    """Trials with these values at the first rung, and some with more at the second, noted in a random order."""
    history, order = History(), list(range(len(others)))
    rng.shuffle(order)
    for number in range(len(others) + 1):
        history.ask(number, {})
    for number in order:
        history.see(number, Seen(100, (others[number],)))
        if rng.random() < 0.5:
            history.see(number, Seen(300, (rng.random(),)))
    return history


def test_asha_looks_at_the_values_of_a_rung_whatever_their_order_and_whatever_came_later() -> None:
    rng = Random(0)
    both = set()
    for _ in range(50):
        others, own = [rng.random() for _ in range(8)], Seen(100, (rng.random(),))
        found = set()
        for _ in range(10):
            history = rung_history(rng, others)
            history.see(8, own)
            found.add(asha(3).stops(history, 8, own))
        assert len(found) == 1
        both |= found
    assert both == {None, "asha"}


def test_a_point_is_judged_once_at_a_rung() -> None:
    rule, history = asha(3), History()
    for number in range(4):
        history.ask(number, {})
    for number in range(3):
        history.see(number, Seen(100, (1.0,)))
    history.see(3, first := Seen(120, (0.5,)))
    assert rule.stops(history, 3, first) is None
    history.see(3, second := Seen(200, (9.0,)))
    assert rule.stops(history, 3, second) is None
    for number in range(3):
        history.see(number, Seen(300, (1.0,)))
    history.see(3, third := Seen(310, (9.0,)))
    assert rule.stops(history, 3, third) == "asha"


def test_at_the_full_budget_there_is_nothing_to_stop() -> None:
    for rule in RULES:
        for tokens, reasons in ((800, {"asha", "hyperband", "median"}), (900, {None}), (950, {None})):
            history = History()
            for number in range(40):
                history.ask(number, {})
                history.see(number, Seen(tokens, (float(number),)))
            history.ask(40, {})
            history.see(40, last := Seen(tokens, (99.0,)))
            assert rule.stops(history, 40, last) in reasons


@pytest.mark.parametrize("rule", [*RULES, NoRule()], ids=["asha", "hyperband", "median", "none"])
def test_a_value_that_is_not_finite_ends_a_trial_and_judges_no_other(rule: Rule) -> None:
    for values in ((math.nan,), (math.inf,), (-math.inf,), (1.0, math.nan)):
        history = History()
        for number, tokens in enumerate((50, 100, BUDGET)):
            history.ask(number, {})
            history.see(number, seen := Seen(tokens, values))
            assert rule.stops(history, number, seen) == "nonfinite"
        for number in range(3, 7):
            history.ask(number, {})
            history.see(number, seen := Seen(100, (1.0,)))
            assert rule.stops(history, number, seen) is None


def test_the_rule_of_a_sweep() -> None:
    def built(**changes: Any) -> Rule:
        return build_rule(settings(tokens=BUDGET, evaluations=9, seed=7, **changes))

    assert rungs(100, 3, 900) == (100, 300)
    assert rungs(100, 3, 901) == (100, 300, 900)
    assert rungs(900, 3, 900) == ()
    assert built(scheduler="asha") == Asha((100, 300), 900, 3, 1.0)
    assert built(scheduler="asha", grace=50, reduction=4) == Asha((50, 200, 800), 900, 4, 1.0)
    assert built(scheduler="asha", objectives=[{"mode": "max"}]) == Asha((100, 300), 900, 3, -1.0)
    assert built(scheduler="hyperband") == Hyperband((100, 300), 900, 3, 1.0, 7)
    assert built(scheduler="median") == Median(100, 900, 1.0)
    assert built(scheduler="none") == built(scheduler="pbt", searcher="random") == NoRule()
    assert built(scheduler="hyperband", grace=900).stops(History(), 0, Seen(100, (1.0,))) is None


# ---- losses of different texts --------------------------------------------------------------------------------------

TWO = preset("fundamentallm/two-phase")
SHARED = SpaceOptions(space="phase_lengths")
TYPED = SpaceOptions(set_space=["optim.lr=log(1e-4,1e-2)", "phases.prose.budget.share=uniform(0.3,0.7)"])


@pytest.mark.parametrize("searched", [SHARED, TYPED], ids=["catalogued", "typed"])
def test_where_the_lengths_of_phases_are_searched_nothing_is_compared_early(searched: SpaceOptions) -> None:
    """By default, and any rule that would is refused; other spaces have asha."""
    _, draft, _ = sought(TWO, searched, SearchOptions(), "cpu")
    assert draft["scheduler"] == "none"
    _, same, _ = sought(TWO, searched, SearchOptions(scheduler="none"), "cpu")
    assert same == draft
    for scheduler in ("asha", "hyperband", "median", "pbt"):
        with pytest.raises(ConfigError, match=r"phases\.prose\.budget\.share.*say --scheduler none") as refusal:
            sought(TWO, searched, SearchOptions(scheduler=scheduler), "cpu")  # type: ignore[arg-type]
        assert "\n" not in str(refusal.value)


def test_where_they_are_not_trials_are_compared() -> None:
    """Negative control: the same run of two phases."""
    assert sought(TWO, SpaceOptions(space="lr"), SearchOptions(), "cpu")[1]["scheduler"] == "asha"
    sought(TWO, SpaceOptions(space="lr"), SearchOptions(scheduler="median"), "cpu")
