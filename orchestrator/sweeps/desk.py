"""TrialDesk: hands out points, hears how they go, decides who stops, and closes what has ended.

Tune's loop calls `next_job`, `said` and `over` on its thread; the driver calls the rest. The journal is written before
a decision leaves the desk, so a killed driver's successor knows all of them.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

from orchestrator.experiment import OUTCOME
from orchestrator.sweeps.history import PENALTY, RESUMABLE, Ending, Exploit, Seen, StopReason, Trial, seed_names
from orchestrator.sweeps.journal import Journal
from orchestrator.sweeps.point import TURN, PointJob
from orchestrator.sweeps.population import Population
from orchestrator.sweeps.rules import Rule
from orchestrator.sweeps.searchers import Searcher
from orchestrator.sweeps.settings import SweepSettings
from orchestrator.sweeps.training import EXPLOITED, SeedTraining
from orchestrator.sweeps.tuning import Later
from trainers.context import GIVEN_UP
from trainers.errors import ConfigError

Open = Callable[[Trial], list[SeedTraining]]
LAST_WORDS_S = 60.0  # for a stopped training to write its outcome
STANDS_BACK_S = 0.5  # the closing of a trial, for the beginning of the next: a slot waits for that


@dataclass
class Running:
    """A trial that Tune has been given."""

    trial: Trial
    seeds: list[SeedTraining]
    began: float = field(default_factory=time.monotonic)
    stop: StopReason | None = None
    """why it was told to stop"""
    silent: bool = False
    """it trains no more, so what it has not written by now it never will"""


class TrialDesk:
    """`open_trial` makes the folders, claims and MLflow runs of a point's seeds; `refused` tells MLflow of a trial that
    `open_trial` refused."""

    def __init__(
        self,
        journal: Journal,
        settings: SweepSettings,
        searcher: Searcher,
        rule: Rule,
        milestones: list[int],
        open_trial: Open,
        say: Callable[[str], None],
        population: Population | None = None,
        take_over: Callable[[Exploit], None] = lambda exploit: None,
        refused: Callable[[Trial], None] = lambda trial: None,
    ):
        self.journal = journal
        self.history = journal.history
        self.settings = settings
        self.running: dict[int, Running] = {}
        self.closing: StopReason | None = None
        """why nothing more is handed out"""
        self.error: BaseException | None = None
        """what went wrong at the desk itself; the driver raises it"""
        self.told: list[tuple[int, tuple[float, ...]]] = []
        """(trial, values) as the searcher was told in this process"""
        self._searcher, self._rule, self._milestones = searcher, rule, milestones
        self._open_trial, self._say = open_trial, say
        self._population, self._take_over, self._refused = population, take_over, refused
        self._resting: dict[int, Running] = {}
        """members of a population between two rounds"""
        self._best = best_of(self.history.ended(), settings)
        self._kept: Trial | None = None
        """of the completed trials the one that still has its checkpoints"""
        self._sunk: set[int] = set()
        """members that left the finite numbers in this round"""
        self._waiting = [] if population else list(self.history.unfinished())
        self._awake = {trial.number for trial in self.history.unfinished()} if population else set()
        """members of which another driver left off and nobody knows whether they rest at the end of a round"""
        self._closed: Queue[tuple[Running, str, bool] | None] = Queue()
        self._slots_at_work = threading.Event()
        """clear between the end of a trial and the word on what follows it"""
        self._exhausted = False
        """nothing follows any more"""
        self._closer = threading.Thread(target=self._close_all, name="trial-closer", daemon=True)
        self._closer.start()

    # ---- for Tune -------------------------------------------------------------------------------

    def next_job(self) -> PointJob | Later | None:
        """The next point: one that was interrupted, else a new one; of a population, a member's next round."""
        job = None
        try:
            job = self._next_job()
        finally:
            self._exhausted = job is None
            self._slots_at_work.set()
        return job

    def _next_job(self) -> PointJob | Later | None:
        with self._watched():
            while self.closing is None:
                trial = self._next_member() if self._population else self._next_trial()
                if trial is None or isinstance(trial, Later):
                    return trial
                try:
                    return self._begin(trial)
                except ConfigError as error:  # a combination of legal values that makes no run
                    self._end(trial.number, "error", 0, 0.0, str(error))
                    self._refused(trial)
        return None

    def _begin(self, trial: Trial) -> PointJob:
        self._awake.discard(trial.number)
        running = self._resting.pop(trial.number, None) or Running(trial, self._open_trial(trial))
        self.running[trial.number] = running
        if self.closing is not None:  # meanwhile, on the driver's thread
            running.stop = self.closing
            self._tell_to_stop(running)
        metrics = [objective.metric for objective in self.settings.objectives]
        until = self._population.milestones[self.history.rounds] if self._population else None
        return PointJob(trial.number, [seed.job for seed in running.seeds], metrics, self._milestones, until)

    def said(self, number: int, result: dict[str, Any]) -> bool:
        """Take in an evaluation; True where the trial is to stop."""
        with self._watched():
            running = self.running[number]
            seen = Seen(result["tokens"], tuple(result["values"]), result["spread"])
            self.journal.see(number, seen, lambda: self._rule.stops(self.history, number, seen))
            running.stop = running.stop or running.trial.stop
            if running.stop is not None:
                self._tell_to_stop(running)
            return running.stop is not None
        return True

    def over(self, number: int, result: dict[str, Any], error: str | None) -> None:
        """A trial has ended: note how, and close its runs behind Tune's back."""
        if not self._exhausted:
            self._slots_at_work.clear()
        with self._watched():
            running = self.running.pop(number)
            running.silent = error is not None or bool(result.get("state"))
            reason, message = _ending(running, result, error)
            train_s = float(result.get("train_s", 0.0))
            rounds_left = self._population is not None and self.history.rounds + 1 < len(self._milestones)
            sinks = rounds_left and reason == "nonfinite"
            stays = reason in RESUMABLE or (reason == "error" and self.error is not None)  # at the desk, not its own
            if reason == TURN or sinks or stays:
                self.journal.rest(number, train_s)
            if reason == TURN:
                self._resting[number] = running
                return
            if sinks:
                self._sunk.add(number)  # it goes on from a better one after this round
            elif not stays:
                self._end(number, reason, int(result.get("tokens", 0)), train_s, message)
            self._closed.put((running, reason, reason in GIVEN_UP))

    # ---- for the driver -------------------------------------------------------------------------

    def close(self, reason: StopReason) -> None:
        """Hand out nothing more, and stop what runs at its next step boundary; it can go on later."""
        if self.closing is None:
            self.closing = reason
            for running in list(self.running.values()):
                if running.stop is None:
                    running.stop = reason
                    self._tell_to_stop(running)

    def finish(self) -> None:
        """Wait until every ended trial is closed in MLflow too. Raises what went wrong at the desk."""
        for running in self._resting.values():
            self._closed.put((running, self.closing or "error", False))
        self._closed.put(None)
        self._closer.join()
        if self.error is not None:
            raise self.error

    def best(self) -> Trial | None:
        """The completed trial with the best first objective."""
        return self._best

    @property
    def left(self) -> int:
        """Trials that have not ended for good, at most."""
        return self.settings.trials - sum(1 for _ in self.history.ended())

    @property
    def tokens(self) -> int:
        """Trained on so far, over all trials and seeds."""
        trials = list(self.history.trials.values())  # Tune's thread adds to them
        return sum(trial.seen[-1].tokens for trial in trials if trial.seen) * self.settings.seeds

    # ---- inside ---------------------------------------------------------------------------------

    def _watched(self) -> _Watch:
        return _Watch(self)

    def _next_trial(self) -> Trial | None:
        while self._waiting:
            trial = self._waiting.pop(0)
            if trial.stop is None:
                return trial
            self._close_judged(trial, trial.stop)
        if len(self.history.trials) >= self.settings.trials:
            return None
        params = self._searcher.ask(self.history)
        return None if params is None else self.journal.ask(params)

    def _close_judged(self, trial: Trial, reason: StopReason) -> None:
        """End a trial that was to stop when its driver was killed, without training it further."""
        running = Running(trial, self._open_trial(trial), stop=reason, silent=True)
        self._end(trial.number, reason, 0, 0.0, "")
        self._closed.put((running, reason, reason in GIVEN_UP))

    def _next_member(self) -> Trial | Later | None:
        """A member of the population that has its next round before it; between rounds, who takes over from whom."""
        assert self._population is not None
        while True:
            if len(self.history.trials) < self.settings.trials and (trial := self._next_trial()) is not None:
                return trial
            members = list(self.history.unfinished())
            for trial in members:
                behind = self._population.round_of(trial) <= self.history.rounds and trial.number not in self._sunk
                if (behind or trial.number in self._awake) and trial.number not in self.running:
                    return trial
            if self.running:
                return Later()
            if not members or self.history.rounds + 1 >= len(self._population.milestones):
                return None
            self._begin_round(self._population, self.history.rounds + 1)

    def _begin_round(self, population: Population, finished_round: int) -> None:
        """Copy the checkpoints that are taken over, and only then note it: a kill between the two changes nothing."""
        exploits = population.exploits(self.history, finished_round)
        for each in exploits:
            self._take_over(each)
        self.journal.exploit(finished_round, exploits)
        for each in exploits:
            self._sunk.discard(each.trial)
            if (resting := self._resting.pop(each.trial, None)) is not None:
                self._closed.put((resting, EXPLOITED, True))
            names = [self.history.trials[number].name for number in (each.trial, each.parent)]
            self._say(f"{names[0]} goes on from {names[1]} at {each.tokens:,} tokens with {each.params}")
        for number in sorted(self._sunk):
            self._end(number, "nonfinite", 0, 0.0, "nobody was left to go on from")
        self._sunk.clear()

    def _tell_to_stop(self, running: Running) -> None:
        assert running.stop is not None
        for seed in running.seeds:
            seed.request_stop(running.stop)

    def _end(self, number: int, reason: StopReason, tokens: int, train_s: float, message: str) -> None:
        trial = self.history.trials[number]
        failed = reason in ("nonfinite", "oom", "error") or not trial.seen
        penalties = tuple(PENALTY * objective.sign for objective in self.settings.objectives)
        values = penalties if failed else trial.seen[-1].values
        tokens = trial.seen[-1].tokens if trial.seen else tokens
        self.journal.end(number, Ending(reason, values, tokens, trial.train_s + train_s, message))
        self.told.append((number, values))
        self._best = best_of([each for each in (self._best, trial) if each is not None], self.settings)

    def _close_all(self) -> None:
        while (item := self._closed.get()) is not None:
            running, reason, given_up = item
            self._slots_at_work.wait(STANDS_BACK_S)
            try:
                self._close_trial(running, reason, given_up)
            except Exception as error:
                self._say(f"{running.trial.name} could not be closed: {type(error).__name__}: {error}")

    def _close_trial(self, running: Running, reason: str, given_up: bool) -> None:
        deadline = time.monotonic() + LAST_WORDS_S
        while not running.silent and time.monotonic() < deadline:
            if all((seed.folder / OUTCOME).exists() for seed in running.seeds):
                break
            time.sleep(0.05)
        for seed in running.seeds:
            seed.close(reason, running.trial.ending)
        if given_up:
            _drop_checkpoints(seed.folder for seed in running.seeds)
        elif reason == "completed":
            self._keep_best(running)

    def _keep_best(self, running: Running) -> None:
        """Of the trials that went the whole way only the best keeps its checkpoints."""
        best, sweep_folder = self.best(), running.seeds[0].folder.parent
        others = list(self.history.ended()) if self._kept is None else [self._kept, running.trial]
        self._kept = best
        for trial in others:
            if trial is not best and trial.ending is not None and trial.ending.reason == "completed":
                _drop_checkpoints(
                    sweep_folder / name for name in seed_names(trial.number, self.settings.seeds, len(trial.lineage))
                )


class _Watch:
    """What goes wrong at the desk ends the sweep in order: Tune would go on without it, or bury it in a warning."""

    def __init__(self, desk: TrialDesk):
        self._desk = desk

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            return False
        if self._desk.error is None:
            self._desk.error = error
            self._desk.close("error")
        return isinstance(error, Exception)


def best_of(trials: Iterable[Trial], settings: SweepSettings) -> Trial | None:
    """The completed trial with the best first objective; the earlier of equals."""
    completed = [trial for trial in trials if trial.ending is not None and trial.ending.reason == "completed"]
    sign = settings.objective.sign
    return min(completed, key=lambda trial: (sign * trial.ending.values[0], trial.number), default=None)  # type: ignore[union-attr]


def _ending(running: Running, result: dict[str, Any], error: str | None) -> tuple[Any, str]:
    """Why a trial ended, and what went wrong."""
    if error is not None and not result.get("state"):
        return "error", error
    if running.stop is not None and result.get("state") != "finished":
        return running.stop, ""
    match result.get("state"):
        case "finished":
            return "completed", ""
        case "failed":
            return result["reason"], result["message"]
        case "stopped" if result["reason"] == TURN:
            return TURN, ""
        case _:
            return "user", ""


def _drop_checkpoints(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
