"""Whole sweeps in this process: the desk, the journal and real trainings of a dozen steps, without Tune and MLflow.

What Tune does is here a loop over the slots in turn, so that what happens, happens in the same order every time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.sweeps.desk import TrialDesk
from orchestrator.sweeps.driver import milestones_of
from orchestrator.sweeps.history import Ending, Exploit, History, StopReason, Trial, seed_names
from orchestrator.sweeps.journal import JOURNAL, Journal
from orchestrator.sweeps.point import PointRun
from orchestrator.sweeps.population import Population
from orchestrator.sweeps.rules import build_rule
from orchestrator.sweeps.searchers import build_searcher
from orchestrator.sweeps.settings import SweepSettings
from orchestrator.sweeps.sweep import Sweep
from orchestrator.sweeps.training import take_over
from orchestrator.sweeps.trials import in_tokens, run_of
from orchestrator.sweeps.tuning import Later
from search_spaces.space import Axis, Float, Space
from tests.trainers.crash import Ending as Left
from tests.trainers.crash import ending
from tests.trainers.small_runs import config_for, write_text
from trainers.claim import Claim, Guard
from trainers.config import RunConfig
from trainers.context import request_stop

EVALUATIONS = 4
RATES = Space((Axis("optim.lr", Float(1e-4, 3e-2, log=True)),))


class Cut(Exception):
    """The driver is no more."""


class Seed:
    """A training as the desk holds it, without a run in MLflow."""

    def __init__(self, sweep: Inline, name: str, job: dict[str, Any], claim: Claim):
        self.folder = sweep.folder / name
        self.job = job
        self.claim = claim
        self._closed = sweep.closed

    def request_stop(self, reason: StopReason) -> None:
        request_stop(self.folder, self.claim.generation, reason)

    def close(self, reason: str, ending: Ending | None) -> None:
        self._closed.append((self.folder.name, reason, ending))
        self.claim.release()


class Inline:
    """One sweep in a folder; `play` takes it to its end from wherever it stands, as often as it is cut."""

    def __init__(
        self, folder: Path, space: Space = RATES, *, slots: int = 1, base: RunConfig | None = None, **settings: Any
    ):
        """`base`: one phase whose budget is in steps; else a dozen steps on a few hundred characters."""
        folder.mkdir(parents=True, exist_ok=True)
        base = base or config_for(write_text(folder), logging={"every_steps": 1})
        assert base.budget is not None and base.budget.steps is not None
        tokens = base.budget.steps * base.tokens_per_step
        self.base = in_tokens(base, [tokens])
        self.folder, self.space, self.slots = folder / "sweep", space, slots
        values = {"trials": 4, "searcher": "random", "scheduler": "none", "evaluations": EVALUATIONS} | settings
        self.settings = SweepSettings.model_validate({"space": space.to_json(), "tokens": tokens, **values})
        self.sweep = Sweep("sweep", self.folder, folder, self.base, self.settings, space, {}, (), "cpu")
        self.closed: list[tuple[str, str, Ending | None]] = []
        """(folder, why, the trial's ending) of every training that was closed"""
        self.said: list[str] = []
        self.events = 0
        """evaluations and ends heard so far in this play"""
        self.before_taking_over: Callable[[Exploit, History], None] = lambda exploit, history: None
        self.broken: Callable[[Trial], None] = lambda trial: None
        """raises where a trial is to fail to open"""
        self.refused: list[Trial] = []
        """trials of which MLflow would have been told that they make no run"""
        self._runs: list[tuple[int, PointRun]] = []
        self._seeds: list[Seed] = []

    def play(self, *, cut_at: int | None = None, then: Callable[[TrialDesk], None] | None = None) -> TrialDesk:
        """Train until the desk has nothing more. `cut_at`: raise Cut after so many events, as a kill would, with the
        trainings left where they stand; `then`: called after every event."""
        self.events, self._runs, self._seeds = 0, [], []
        claim = Claim.acquire(self.folder)
        journal = Journal(self.folder / JOURNAL, Guard.begin_attempt(self.folder, claim.generation))
        population = Population(self.settings, self.space) if self.settings.scheduler == "pbt" else None
        desk = TrialDesk(
            journal,
            self.settings,
            build_searcher(self.settings, self.space),
            build_rule(self.settings),
            milestones_of(self.settings),
            self._open,
            self.said.append,
            population,
            lambda exploit: self._take_over(exploit, journal.history),
            self.refused.append,
        )
        try:
            self._loop(desk, cut_at, then)
            desk.finish()
        finally:
            for seed in self._seeds:
                seed.claim.release()
            for _, run in self._runs:
                assert run.end()
            journal.close()
            claim.release()
        return desk

    def left(self, number: int, history: History) -> Left:
        """What a trial's folder holds, of several seeds the first's."""
        trial = history.trials[number]
        return ending(self.folder / seed_names(number, self.settings.seeds, len(trial.lineage))[0], 0)

    # ---- as Tune ---------------------------------------------------------------------------------

    def _loop(self, desk: TrialDesk, cut_at: int | None, then: Callable[[TrialDesk], None] | None) -> None:
        while True:
            while len(self._runs) < self.slots:
                job = desk.next_job()
                if job is None or isinstance(job, Later):
                    break
                self._runs.append((job.number, PointRun(job)))
            if not self._runs:
                assert not isinstance(job, Later), "everybody waits for somebody"
                return
            for number, run in list(self._runs):
                self._step(desk, number, run)
                self.events += 1
                if then is not None:
                    then(desk)
                if self.events == cut_at:
                    raise Cut

    def _step(self, desk: TrialDesk, number: int, run: PointRun) -> None:
        result = run.next().to_json()
        if not result["state"] and not desk.said(number, result):
            return
        self._runs.remove((number, run))
        desk.over(number, result, None)
        assert run.end()

    def _open(self, trial: Trial) -> list[Any]:
        self.broken(trial)
        seeds = []
        for index, name in enumerate(seed_names(trial.number, self.settings.seeds, len(trial.lineage))):
            config = run_of(self.base, trial.params, self.settings, seed_index=index)
            claim = Claim.acquire(self.folder / name)
            (self.folder / name / "stop-request.json").unlink(missing_ok=True)
            job = {
                "config": config.model_dump(mode="json"),
                "run_dir": str(self.folder / name),
                "cache_dir": str(self.folder.parent / ".cache"),
                "generation": claim.generation,
                "threads": 1,
                "tracking": {},
                "workers": 1,
                "share": {},
            }
            seeds.append(Seed(self, name, job, claim))
        self._seeds += seeds
        return seeds

    def _take_over(self, exploit: Exploit, history: History) -> None:
        self.before_taking_over(exploit, history)
        take_over(self.sweep, history, exploit)


def play_with_cuts(sweep: Inline, cuts: list[int]) -> TrialDesk:
    """The sweep, cut after so many events of each life in turn, and then to its end."""
    for cut in cuts:
        try:
            return sweep.play(cut_at=cut)
        except Cut:
            pass
    return sweep.play()


def forget(sweep: Inline) -> None:
    shutil.rmtree(sweep.folder)
