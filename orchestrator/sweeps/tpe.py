"""TPESearcher: Optuna's tree-structured Parzen estimator over a sweep's history, for one objective or several.

Bergstra et al. 2011 (NeurIPS), multivariate and with groups for conditional axes; several objectives as in Ozaki et al.
2022 (doi:10.1613/jair.1.13188). NSGA-II, Optuna's other choice there, needs populations of tens of trials before it
selects anything, which is more than most sweeps have.

Optuna's sampler is made anew for every ask, with a seed of its own, and draws in a trial that is then discarded (failed
trials are invisible to it). What enters the study is what the history says, so a study that was rebuilt from the
journal holds the same trials as the one that was killed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from orchestrator.sweeps.draws import generator, seed32
from orchestrator.sweeps.history import FAILED, History, Params, Trial
from orchestrator.sweeps.searchers import Asked, Reader, first_unasked, told, unasked
from orchestrator.sweeps.settings import Objective
from search_spaces.domains import same
from search_spaces.space import Axis, Choice, Domain, Float, Int, Space, Value

STARTUP = 10
"""finished trials before the estimator is asked; until then the draws are random"""
REDRAWS = 4
"""draws of the estimator that may meet points asked for before, until one is drawn at random"""


class TPESearcher:
    """Asks where good trials are likely and bad ones are not; running trials count as bad, which spreads the asks.

    In a space of finitely many points no point is asked for twice.
    """

    def __init__(self, space: Space, objectives: Sequence[Objective], seed: int, trials: int):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = space
        self._objectives = tuple(objectives)
        self._seed = seed
        self._startup = min(STARTUP, max(1, trials // 3))
        self._asked = Asked()
        self._reader = Reader()
        self._study = _Study(space, self._objectives)

    def ask(self, history: History) -> Params | None:
        self._asked.read(history)
        if self._reader.is_new(history):
            self._study = _Study(self._space, self._objectives)
        for event in self._reader.read(history):
            trial = history.trials[event.trial]
            self._study.add(trial) if event.kind == "asked" else self._study.end(trial)
        number = len(history.trials)
        found, _ = first_unasked(self._draws(number), self._asked)
        return found or unasked(self._space, self._asked, generator("tpe", self._seed, number))

    def _draws(self, number: int) -> Iterator[Params]:
        for attempt in range(REDRAWS):
            yield self._study.draw(self._sampler(seed32("tpe", self._seed, number, attempt)))

    def _sampler(self, seed: int) -> optuna.samplers.TPESampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group` is one
            return optuna.samplers.TPESampler(
                multivariate=True,
                group=any(axis.when is not None for axis in self._space.axes),
                constant_liar=True,
                n_startup_trials=self._startup,
                seed=seed,
            )


class _Study:
    """A history as Optuna's sampler sees it."""

    def __init__(self, space: Space, objectives: tuple[Objective, ...]):
        self._space = space
        self._objectives = objectives
        self._storage = InMemoryStorage()
        self._study = optuna.create_study(
            storage=self._storage, directions=[f"{objective.mode}imize" for objective in objectives]
        )
        self._study_id = self._storage.get_study_id_from_name(self._study.study_name)
        self._ids: dict[int, int] = {}
        """number of a trial -> Optuna's id"""

    def add(self, trial: Trial) -> None:
        """A trial that runs."""
        axes = [self._space.axis(path) for path in trial.params]
        running = create_trial(
            state=TrialState.RUNNING,
            params={axis.path: _to_optuna(axis.domain, trial.params[axis.path]) for axis in axes},
            distributions={axis.path: _distribution(axis.domain) for axis in axes},
        )
        self._ids[trial.number] = self._storage.create_new_trial(self._study_id, running)

    def end(self, trial: Trial) -> None:
        """The end of one that ran.

        Of one objective, completed trials rank first, then stopped ones by how far they came and their value there,
        then failed ones: as if stopped at 0 tokens, since a completed one would rank before every stopped one, however
        large its penalty. Several objectives know no such ranking, so there each trial counts with its last values.
        """
        assert trial.ending is not None
        identifier = self._ids[trial.number]
        values = told(self._objectives, trial.ending)
        if trial.ending.reason == "completed" or len(self._objectives) > 1:
            self._storage.set_trial_state_values(identifier, TrialState.COMPLETE, values)
            return
        for tokens, value in self._way(trial, values[0]):
            self._storage.set_trial_intermediate_value(identifier, tokens, value)
        self._storage.set_trial_state_values(identifier, TrialState.PRUNED, values)

    def _way(self, trial: Trial, value: float) -> list[tuple[int, float]]:
        """(tokens, value) of a trial that did not complete."""
        assert trial.ending is not None
        if trial.ending.reason in FAILED:
            return [(0, value)]
        return [(seen.tokens, seen.values[0]) for seen in trial.seen if math.isfinite(seen.values[0])]

    def draw(self, sampler: optuna.samplers.BaseSampler) -> Params:
        """A point that `sampler` suggests now; leaves nothing that a sampler could see."""
        self._study.sampler = sampler
        trial = self._study.ask()
        point: Params = {}
        for axis in self._space.axes:
            if axis.exists(point):
                point[axis.path] = _suggest(trial, axis)
        self._study.tell(trial, state=TrialState.FAIL)
        assert self._space.holds(point), point
        return point


# ---- our domains and Optuna's distributions -------------------------------------------------------------


def _suggest(trial: optuna.Trial, axis: Axis) -> Value:
    match axis.domain:
        case Float() as domain:
            value = trial.suggest_float(axis.path, domain.low, domain.high, log=domain.log)
            return min(domain.high, max(domain.low, value))  # exp(log(high)) may lie above high
        case Int() as domain:
            return trial.suggest_int(axis.path, domain.low, _last(domain), log=domain.log, step=domain.step)
        case Choice() as domain:
            return domain.values[trial.suggest_categorical(axis.path, range(len(domain.options)))]


def _distribution(domain: Domain) -> BaseDistribution:
    match domain:
        case Float():
            return FloatDistribution(domain.low, domain.high, log=domain.log)
        case Int():
            return IntDistribution(domain.low, _last(domain), log=domain.log, step=domain.step)
        case Choice():
            return CategoricalDistribution(range(len(domain.options)))


def _to_optuna(domain: Domain, value: Value) -> Any:
    """An option goes by its index: Optuna takes no lists."""
    if not isinstance(domain, Choice):
        return value
    return next(index for index, option in enumerate(domain.options) if same(option, value))


def _last(domain: Int) -> int:
    """The greatest value: Optuna warns of a range that its step does not divide."""
    return domain.low + (domain.high - domain.low) // domain.step * domain.step
