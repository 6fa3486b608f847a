"""TrialDesk: hands out points, hears how they go, decides who stops, and closes what has ended.

Tune's loop calls `next_job`, `said` and `over` on its thread; the driver calls the rest. The journal is written before
a decision leaves the desk, so a killed driver's successor knows all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from orchestrator.absence import Absence
from orchestrator.sweeps.closing import Closer, Running
from orchestrator.sweeps.history import FAILED, PENALTY, RESUMABLE, Ending, Exploit, Seen, StopReason, Trial
from orchestrator.sweeps.journal import Journal
from orchestrator.sweeps.point import TURN, PointJob
from orchestrator.sweeps.population import Population
from orchestrator.sweeps.rules import Rule
from orchestrator.sweeps.searchers import Searcher
from orchestrator.sweeps.settings import SweepSettings
from orchestrator.sweeps.training import EXPLOITED, SeedTraining
from orchestrator.sweeps.tuning import Died, Later
from orchestrator.tracking import StoreAway
from trainers.errors import ConfigError

Open = Callable[[Trial], list[SeedTraining]]


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
        self._sunk: set[int] = set()
        """members that left the finite numbers in this round"""
        self._waiting = [] if population else list(self.history.unfinished())
        self._awake = {trial.number for trial in self.history.unfinished()} if population else set()
        """members of which another driver left off and nobody knows whether they rest at the end of a round"""
        self._exhausted = False
        """nothing follows any more"""
        self._searched_out = False
        """the searcher has nothing left to ask for"""
        self._store = Absence(
            say,
            away="MLflow is away ({problem}): the trials at work go on, the next one begins when it is back.",
            back="MLflow is back: trials begin again.",
        )
        self._held_back: Trial | None = None
        """it waits for the store to begin"""
        self._closer = Closer(journal.folder, self.history, settings, self.best, say)

    # ---- for Tune -------------------------------------------------------------------------------

    def next_job(self) -> PointJob | Later | None:
        """The next point: one that was interrupted, else a new one; of a population, a member's next round."""
        job = None
        try:
            job = self._next_job()
        finally:
            self._exhausted = job is None
            self._closer.slots_at_work.set()
        return job

    def _next_job(self) -> PointJob | Later | None:
        with self._watched():
            while self.closing is None and self._store.is_due:
                try:
                    trial = self._held_back or self._next()
                    if trial is None or isinstance(trial, Later):
                        return trial
                    self._held_back = trial
                    job = self._begin_or_refuse(trial)
                    self._held_back = None
                    if job is not None:
                        return job
                except StoreAway as error:
                    self._store.note(str(error.__cause__ or error))
            return Later() if self.closing is None else None
        return None

    def _begin_or_refuse(self, trial: Trial) -> PointJob | None:
        """None for a combination of legal values that makes no run."""
        try:
            return self._begin(trial)
        except ConfigError as error:
            self._end(trial.number, "error", 0, 0.0, str(error))
        self._held_back = None
        self._refused(trial)
        return None

    def _begin(self, trial: Trial) -> PointJob:
        self._awake.discard(trial.number)
        running = self._resting.pop(trial.number, None)
        if running is None:
            running = Running(trial, self._open_trial(trial))
            self._store.end()
        self.running[trial.number] = running
        if self.closing is not None:  # meanwhile, on the driver's thread
            running.stop = self.closing
            running.tell_to_stop()
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
                running.tell_to_stop()
            return running.stop is not None
        return True

    def over(self, number: int, result: dict[str, Any], died: Died | None) -> None:
        """A trial has ended: note how, and close its runs behind Tune's back."""
        if not self._exhausted:
            self._closer.slots_at_work.clear()
        with self._watched():
            running = self.running.pop(number)
            running.silent = died is not None or bool(result.get("state"))
            reason, message = _ending(running, result, died)
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
            self._closer.put(running, reason)

    # ---- for the driver -------------------------------------------------------------------------

    def close(self, reason: StopReason) -> None:
        """Hand out nothing more, and stop what runs at its next step boundary; it can go on later."""
        if self.closing is None:
            self.closing = reason
            for running in list(self.running.values()):
                if running.stop is None:
                    running.stop = reason
                    running.tell_to_stop()

    def finish(self) -> None:
        """Wait until every trial that was begun is closed in MLflow too, those that a failed Tune left at work as well.
        Raises what went wrong at the desk. A stop that found nothing left to train is none."""
        reason = self.closing or "error"
        for running in self.running.values():
            running.stop, running.silent = running.stop or reason, True
            running.tell_to_stop()
        for running in (*self.running.values(), *self._resting.values()):
            self._closer.put(running, reason)
        self.running.clear()
        self._closer.finish()
        if self.error is not None:
            raise self.error
        if self.closing in RESUMABLE and self._ended_for_good():
            self.closing = None

    def best(self) -> Trial | None:
        """The completed trial with the best first objective."""
        return self._best

    @property
    def trained(self) -> bool:
        """Whether nothing is left to train: every trial there will be has ended, or had its last evaluation."""
        asked = self._searched_out or len(self.history.trials) >= self.settings.trials
        last = self.settings.tokens
        return asked and all(trial.seen and trial.seen[-1].tokens >= last for trial in self.history.unfinished())

    def _ended_for_good(self) -> bool:
        """Whether every trial there will be has ended, once nobody asks for another."""
        if any(self.history.unfinished()):
            return False
        return len(self.history.trials) >= self.settings.trials or self._searcher.ask(self.history) is None

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

    def _next(self) -> Trial | Later | None:
        return self._next_member() if self._population else self._next_trial()

    def _next_trial(self) -> Trial | None:
        while self._waiting:
            trial = self._waiting[0]
            if trial.stop is not None:
                self._close_judged(trial, trial.stop)
            self._waiting.pop(0)
            if trial.stop is None:
                return trial
        if len(self.history.trials) >= self.settings.trials:
            return None
        params = self._searcher.ask(self.history)
        self._searched_out = params is None
        return None if params is None else self.journal.ask(params)

    def _close_judged(self, trial: Trial, reason: StopReason) -> None:
        """End a trial that was to stop when its driver was killed, without training it further."""
        running = Running(trial, self._open_trial(trial), stop=reason, silent=True)
        self._end(trial.number, reason, 0, 0.0, "")
        self._closer.put(running, reason)

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
                self._closer.put(resting, EXPLOITED)
            names = [self.history.trials[number].name for number in (each.trial, each.parent)]
            self._say(f"{names[0]} goes on from {names[1]} at {each.tokens:,} tokens with {each.params}")
        for number in sorted(self._sunk):
            self._end(number, "nonfinite", 0, 0.0, "nobody was left to go on from")
        self._sunk.clear()

    def _end(self, number: int, reason: StopReason, tokens: int, train_s: float, message: str) -> None:
        trial = self.history.trials[number]
        failed = reason in FAILED or not trial.seen
        penalties = tuple(PENALTY * objective.sign for objective in self.settings.objectives)
        values = penalties if failed else trial.seen[-1].values
        tokens = trial.seen[-1].tokens if trial.seen else tokens
        self.journal.end(number, Ending(reason, values, tokens, trial.train_s + train_s, message))
        self.told.append((number, values))
        self._best = best_of([each for each in (self._best, trial) if each is not None], self.settings)


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


def _ending(running: Running, result: dict[str, Any], died: Died | None) -> tuple[Any, str]:
    """Why a trial ended, and what went wrong."""
    if died is not None and not result.get("state"):
        return died.reason, died.message
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
