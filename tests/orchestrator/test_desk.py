"""Laws of the desk: every trial once, decided and told as the journal says, whatever is cut off and gone on with.

Real trainings in this process, without Tune and MLflow (inline_sweeps.py); through both in test_sweeps.py.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orchestrator.sweeps import closing
from orchestrator.sweeps.desk import TrialDesk
from orchestrator.sweeps.history import PENALTY, Ending, History, Trial
from orchestrator.sweeps.journal import JOURNAL, read_history
from orchestrator.sweeps.point import PointRun
from orchestrator.sweeps.tuning import Died
from search_spaces.space import Axis, Choice, Space
from tests.orchestrator.histories import same_history
from tests.orchestrator.inline_sweeps import EVALUATIONS, RATES, Cut, Inline, play_with_cuts
from trainers.errors import ConfigError

HOPELESS = Space((Axis("optim.lr", Choice((1e-2, 2e-2, 1e-8, 2e-8))),))
HOPEFUL = Space((Axis("optim.lr", Choice((1e-2, 2e-2))),))
DIVERGING = Space((Axis("optim.lr", Choice((1e-2, 1e30))),))


def endings(history: History) -> list[Ending]:
    return [trial.ending for _, trial in sorted(history.trials.items()) if trial.ending is not None]


def lines(sweep: Inline) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (sweep.folder / JOURNAL).read_text().splitlines()]


def assert_each_once(sweep: Inline, history: History) -> None:
    """Asked once, ended once, each evaluation noted once, and the journal is the history."""
    counts = Counter((event["event"], event["trial"], event.get("tokens", 0)) for event in lines(sweep))
    assert all(count == 1 for (kind, *_), count in counts.items() if kind in ("asked", "seen"))
    ended = [event["trial"] for event in lines(sweep) if event["event"] == "ended"]
    assert sorted(ended) == sorted(history.trials)
    assert same_history(read_history(sweep.folder / JOURNAL), history)


def results(sweep: Kept, history: History) -> list[Any]:
    """Per trial: settings, evaluations, ending but for its seconds, and the bits it left."""
    return [
        (t.params, t.seen, t.ending and (t.ending.reason, t.ending.values, t.ending.tokens), sweep.digests[number])
        for number, t in sorted(history.trials.items())
    ]


class Kept(Inline):
    """Notes the bits of a completed trial before they are dropped."""

    def __init__(self, folder: Path, *args: Any, **settings: Any):
        super().__init__(folder, *args, **settings)
        self.digests: dict[int, str | None] = {}

    def play(self, **arguments: Any) -> TrialDesk:
        def note(desk: TrialDesk) -> None:
            for number, trial in desk.history.trials.items():
                if trial.ending is not None and number not in self.digests:
                    self.digests[number] = self.left(number, desk.history).digest

        return super().play(then=note, **arguments)


# ---- cut and gone on ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kept, History]:
    """Four random trials, one at a time, to which nothing happens."""
    sweep = Kept(tmp_path_factory.mktemp("whole"))
    desk = sweep.play()
    assert_each_once(sweep, desk.history)
    assert [ending.reason for ending in endings(desk.history)] == ["completed"] * 4
    return sweep, desk.history


@pytest.mark.parametrize("cuts", [[1], [7], [5, 5], pytest.param([3] * 9, marks=pytest.mark.slow)])
def test_cut_anywhere_every_trial_is_there_once_with_the_same_bits(
    cuts: list[int], whole: tuple[Kept, History], tmp_path: Path
) -> None:
    sweep = Kept(tmp_path)
    desk = play_with_cuts(sweep, cuts)
    assert_each_once(sweep, desk.history)
    theirs, ours = results(*whole), results(sweep, desk.history)
    assert [each[:3] for each in ours] == [each[:3] for each in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[3] in (other[3], None)  # None: it was dropped before anyone looked


def test_another_seed_gives_another_sweep(whole: tuple[Kept, History], tmp_path: Path) -> None:
    """Negative control of the above."""
    other = Inline(tmp_path, seed=1).play().history
    assert [t.params for t in other.trials.values()] != [t.params for t in whole[1].trials.values()]


@pytest.mark.parametrize("cuts", [[4], [9, 6]])
def test_tpe_one_at_a_time_goes_on_as_it_would_have(cuts: list[int], tmp_path: Path) -> None:
    whole = Inline(tmp_path / "whole", searcher="tpe", trials=6, evaluations=2).play().history
    sweep = Inline(tmp_path / "cut", searcher="tpe", trials=6, evaluations=2)
    desk = play_with_cuts(sweep, cuts)
    assert [t.params for t in desk.history.trials.values()] == [t.params for t in whole.trials.values()]
    assert [t.seen for t in desk.history.trials.values()] == [t.seen for t in whole.trials.values()]


def test_more_trials_go_on_where_the_sweep_ended(whole: tuple[Kept, History], tmp_path: Path) -> None:
    sweep = Inline(tmp_path, trials=2)
    sweep.play()
    longer = Inline(tmp_path, trials=4)
    history = longer.play().history
    assert [t.seen for t in history.trials.values()] == [t.seen for t in whole[1].trials.values()]
    assert {name for name, _, _ in longer.closed} == {"t0002", "t0003"}


def test_what_the_searcher_was_told_stands_in_the_journal(tmp_path: Path) -> None:
    sweep = Inline(tmp_path, DIVERGING, searcher="grid", trials=2)
    desk = sweep.play()
    ended = [(event["trial"], tuple(event["values"])) for event in lines(sweep) if event["event"] == "ended"]
    assert desk.told == ended
    assert desk.told == [(number, t.ending.values) for number, t in desk.history.trials.items() if t.ending]


# ---- how trials end -----------------------------------------------------------------------------------------------


def test_what_diverges_counts_as_a_penalty_and_the_sweep_goes_on(tmp_path: Path) -> None:
    for mode, penalty in (("min", PENALTY), ("max", -PENALTY)):
        objectives = [{"metric": "val/accuracy" if mode == "max" else "val/loss", "mode": mode}]
        sweep = Inline(tmp_path / mode, DIVERGING, searcher="grid", trials=2, objectives=objectives)
        desk = sweep.play()
        good, bad = endings(desk.history)
        assert (good.reason, bad.reason, bad.values) == ("completed", "nonfinite", (penalty,))
        assert "not finite" in bad.message
        assert desk.best() is desk.history.trials[0]
        assert [(name, reason) for name, reason, _ in sweep.closed] == [("t0000", "completed"), ("t0001", "nonfinite")]


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_hopeless_trials_are_stopped_and_give_their_disk_back(scheduler: str, tmp_path: Path) -> None:
    sweep = Inline(tmp_path, HOPELESS, searcher="grid", scheduler=scheduler, trials=4, reduction=2)
    if scheduler == "median":
        sweep = Inline(tmp_path, Space((Axis("optim.lr", Choice((1e-2, 2e-2, 3e-2, 1e-8))),)), searcher="grid", scheduler=scheduler)  # fmt: skip # noqa: E501
    desk = sweep.play()
    assert_each_once(sweep, desk.history)
    stopped = [trial for trial in desk.history.trials.values() if trial.ending and trial.ending.reason == scheduler]
    completed = [trial for trial in desk.history.trials.values() if trial.ending and trial.ending.reason == "completed"]
    assert stopped and completed
    for trial in stopped:
        assert trial.params["optim.lr"] < 1e-3 or scheduler == "hyperband"
        assert len(trial.seen) < EVALUATIONS and trial.ending is not None
        assert trial.ending.values == trial.seen[-1].values
        assert not (sweep.folder / trial.name / "checkpoints").exists()
        assert json.loads((sweep.folder / trial.name / "outcome.json").read_text())["reason"] == scheduler
    best = desk.best()
    assert best is not None
    kept = {path.parent.name for path in sweep.folder.glob("t*/checkpoints")}
    assert kept == {best.name}


def test_a_point_that_makes_no_run_is_an_error_and_the_sweep_goes_on(tmp_path: Path) -> None:
    sweep = Inline(tmp_path)

    def refuse(trial: Trial) -> None:
        if trial.number == 1:
            raise ConfigError("optim.lr: not today.")

    sweep.broken = refuse
    desk = sweep.play()
    assert [ending.reason for ending in endings(desk.history)] == ["completed", "error", "completed", "completed"]
    assert endings(desk.history)[1].message == "optim.lr: not today."
    assert endings(desk.history)[1].values == (PENALTY,)
    assert sweep.refused == [desk.history.trials[1]]


def test_a_trial_whose_process_died_too_often_is_an_error(tmp_path: Path) -> None:
    sweep = Inline(tmp_path, trials=2)

    def die(desk: TrialDesk) -> None:
        if sweep.events == 1:
            [(number, run)] = sweep._runs
            sweep._runs.clear()
            desk.over(number, {}, Died("its process died 4 times"))
            assert run.end()

    began = time.monotonic()
    desk = sweep.play(then=die)
    assert time.monotonic() - began < closing.LAST_WORDS_S / 2  # nobody waits for the last words of the dead
    assert [ending.reason for ending in endings(desk.history)] == ["error", "completed"]
    assert "died" in endings(desk.history)[0].message


# ---- stopping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reason", "seeds"), [("user", 1), ("budget", 1), ("user", 3)])
def test_stopped_in_order_it_goes_on_as_if_nothing_had_been(reason: Any, seeds: int, tmp_path: Path) -> None:
    """In its first turn, several seeds stop without waiting for those that never began."""
    whole = Inline(tmp_path / "whole", trials=2, seeds=seeds).play().history
    sweep = Inline(tmp_path / "stopped", trials=2, seeds=seeds)
    began = time.monotonic()
    desk = sweep.play(then=lambda desk: desk.close(reason))
    assert time.monotonic() - began < closing.LAST_WORDS_S / 2
    assert not endings(desk.history) and len(desk.history.trials) == 1
    assert {each for _, each, _ in sweep.closed} == {reason} and len(sweep.closed) == seeds
    assert desk.history.trials[0].train_s > 0
    history = sweep.play().history
    assert_each_once(sweep, history)
    assert [t.seen for t in history.trials.values()] == [t.seen for t in whole.trials.values()]
    ending = history.trials[0].ending
    assert ending is not None and ending.train_s > desk.history.trials[0].train_s


def test_what_goes_wrong_at_the_desk_ends_no_trial_for_good(tmp_path: Path) -> None:
    """A full disk, say: the sweep ends with the error, and goes on when it is mended."""
    whole = Inline(tmp_path / "whole", trials=3).play().history
    sweep = Inline(tmp_path / "broken", trials=3, slots=2)

    def fail(trial: Trial) -> None:
        if trial.number == 2:
            raise OSError(28, "No space left on device")

    sweep.broken = fail
    with pytest.raises(OSError, match="No space"):
        sweep.play()
    assert all(ending.reason == "completed" for ending in endings(read_history(sweep.folder / JOURNAL)))
    sweep.broken = lambda trial: None
    history = sweep.play().history
    assert_each_once(sweep, history)
    assert [t.params for t in history.trials.values()] == [t.params for t in whole.trials.values()]
    assert [t.ending and t.ending.reason for t in history.trials.values()] == ["completed"] * 3


def test_tokens_count_every_seed(tmp_path: Path) -> None:
    sweep = Inline(tmp_path, trials=2, seeds=2)
    desk = sweep.play()
    assert desk.tokens == 2 * 2 * sweep.settings.tokens


class KilledAtVerdict(Inline):
    """Its driver is killed when a trial has been judged and before that has come to anything."""

    def _step(self, desk: TrialDesk, number: int, run: PointRun) -> None:
        result = run.next().to_json()
        if result["state"]:
            self._runs.remove((number, run))
            desk.over(number, result, None)
            assert run.end()
        elif desk.said(number, result):
            raise Cut


@pytest.mark.parametrize("remembered", [True, False], ids=["as it is", "control"])
def test_a_verdict_stands_whatever_is_killed_before_it_is_carried_out(remembered: bool, tmp_path: Path) -> None:
    """The trial is ended as it was judged, without training further; its rung stays as it was for the others."""
    settings: dict[str, Any] = {"searcher": "grid", "scheduler": "asha", "reduction": 2}
    whole = Inline(tmp_path / "whole", HOPELESS, **settings).play().history
    killed = KilledAtVerdict(tmp_path / "killed", HOPELESS, **settings)
    with pytest.raises(Cut):
        killed.play()
    journal = killed.folder / JOURNAL
    *_, last = lines(killed)
    assert (last["event"], last["trial"], last["stop"]) == ("seen", 2, "asha")
    if not remembered:
        journal.write_text(journal.read_text().replace('"stop":"asha"', '"stop":null'))
    again = Inline(tmp_path / "killed", HOPELESS, **settings)
    history = again.play().history
    assert_each_once(again, history)
    same = [[t.seen for t in each.trials.values()] for each in (history, whole)]
    assert (same[0] == same[1]) is remembered
    assert (len(history.trials[2].seen) == 1) is remembered
    if remembered:
        assert again.closed[0][:2] == ("t0002", "asha")
        assert not (again.folder / "t0002" / "checkpoints").exists()


LATER = Space((Axis("optim.lr", Choice((1e4, 1e-2))),))
"""the first diverges, but not in the first turn of its seeds"""


@pytest.mark.parametrize("swept", [True, False], ids=["as it is", "control"])
def test_of_what_ended_only_the_best_keeps_its_checkpoints(
    swept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the seeds of a point that diverged after they had saved, and where a kill came before the closing."""
    if not swept:
        monkeypatch.setattr(closing, "drop_checkpoints", lambda folders: None)
    sweep = Diverging(tmp_path, LATER, searcher="grid", scheduler="asha", trials=2, seeds=3)
    desk = sweep.play()
    assert [ending.reason for ending in endings(desk.history)] == ["nonfinite", "completed"]
    assert sweep.saved >= {f"t0000-s{seed}" for seed in range(3)}, "the diverging seeds had nothing to give back"
    kept = {path.parent.name for path in sweep.folder.glob("t*/checkpoints")}
    assert (kept == {f"t0001-s{seed}" for seed in range(3)}) is swept


class Diverging(Inline):
    """Notes which trainings have saved."""

    def play(self, **arguments: Any) -> TrialDesk:
        self.saved: set[str] = set()

        def note(_: TrialDesk) -> None:
            self.saved |= {path.parent.parent.name for path in self.folder.glob("t*/checkpoints/step-*")}

        return super().play(then=note, **arguments)


def test_what_a_kill_left_of_the_losers_is_given_back(tmp_path: Path) -> None:
    """Between the journal and the closing: the next command, which trains nothing, sweeps it up."""
    sweep = Inline(tmp_path, trials=2)
    desk = sweep.play()
    best = desk.best()
    assert best is not None
    for trial in desk.history.trials.values():
        (sweep.folder / trial.name / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
    Inline(tmp_path, trials=2).play()
    assert {path.parent.name for path in sweep.folder.glob("t*/checkpoints")} == {best.name}


# ---- stops that find nothing left ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["budget", "user"])
def test_a_stop_that_finds_nothing_left_to_train_is_none(reason: Any, tmp_path: Path) -> None:
    """Every trial ended, whether all were asked for or the space ran out; one that is left, and it is a stop."""
    for trials, space, searcher, stopped in (
        (2, RATES, "random", False),
        (9, HOPEFUL, "grid", False),
        (3, RATES, "random", True),
    ):
        sweep = Inline(tmp_path / str(trials), space, searcher=searcher, trials=trials)

        def stop(desk: TrialDesk) -> None:
            if sum(1 for _ in desk.history.ended()) == 2:
                desk.close(reason)

        desk = sweep.play(then=stop)
        assert len(endings(desk.history)) == 2
        assert desk.closing == (reason if stopped else None)


def test_nothing_is_left_to_train_once_all_had_their_last_evaluation(tmp_path: Path) -> None:
    """Which a budget in tokens may have been made for; a trial sooner there is something left."""
    sweep = Inline(tmp_path, trials=2)
    looks: list[tuple[bool, int]] = []
    sweep.play(then=lambda desk: looks.append((desk.trained, desk.tokens)))
    total = 2 * sweep.settings.tokens
    assert {trained for trained, tokens in looks if tokens < total} == {False}
    assert {trained for trained, tokens in looks if tokens >= total} == {True}


def test_a_space_of_two_points_runs_out(tmp_path: Path) -> None:
    sweep = Inline(tmp_path, Space((Axis("optim.lr", Choice((1e-2, 2e-2))),)), trials=10)
    desk = sweep.play()
    assert len(desk.history.trials) == 2
    assert [ending.reason for ending in endings(desk.history)] == ["completed"] * 2
