"""Population based training: the members train in rounds, and after each the worst go on from the best.

Synchronous (Jaderberg et al. 2017, arXiv:1711.09846, section 3 and appendix A.1): when all members have trained a
round, each of the worst quarter takes over the checkpoint of one of the best quarter, weights, optimizer and place in
the text, and goes on with that one's settings perturbed. What is taken over is a function of the history, so a killed
sweep goes on as it would have gone on, and members may outnumber the slots.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from random import Random

from orchestrator.sweeps.draws import generator
from orchestrator.sweeps.history import Exploit, History, Params, Trial
from orchestrator.sweeps.settings import SweepSettings
from search_spaces.domains import Choice, Domain, Int
from search_spaces.space import Space, Value
from trainers.errors import ConfigError

QUANTILE = 0.25
RESAMPLES = 0.25
"""how often a setting is drawn anew instead of perturbed"""
FACTORS = (0.8, 1.2)
CONTINUABLE = re.compile(r"(phases\.[^.]+\.)?(optim\.(?!name)\w+|schedule\.\w+)|model\.dropout\w*")
"""settings that another run's checkpoint can go on with"""


def check_population(space: Space, settings: SweepSettings, workers: int) -> None:
    """ConfigError where a checkpoint could not go on with what the space changes, or there is nobody to learn from."""
    foreign = [path for path in space if not CONTINUABLE.fullmatch(path)]
    if foreign:
        raise ConfigError(
            f"scheduler=pbt changes settings while a model trains, and {', '.join(foreign)} cannot change then: "
            "search learning rate, weight decay, dropout, betas or the schedule, or take another --scheduler."
        )
    if workers > 1:
        raise ConfigError(f"scheduler=pbt trains each member in one process, got --workers {workers}: say --workers 1.")
    if settings.trials < 4:
        raise ConfigError(f"scheduler=pbt needs a population of at least 4, got --trials {settings.trials}.")
    if settings.evaluations < 2:
        raise ConfigError(
            f"scheduler=pbt changes settings between two evaluations, got --evaluations {settings.evaluations}: say 2 "
            "or more."
        )


@dataclass(frozen=True)
class Population:
    settings: SweepSettings
    space: Space

    @property
    def milestones(self) -> list[int]:
        """Tokens at which a round ends; the last is the budget."""
        every, tokens = self.settings.report_every, self.settings.tokens
        return [*range(every, tokens, every), tokens]

    def round_of(self, trial: Trial) -> int:
        """How many rounds a member has trained."""
        tokens = trial.seen[-1].tokens if trial.seen else 0
        return sum(tokens >= milestone for milestone in self.milestones)

    def exploits(self, history: History, finished_round: int) -> list[Exploit]:
        """Who takes over from whom after so many rounds; empty after the last. Every member has been seen there."""
        if finished_round >= len(self.milestones):
            return []
        milestone = self.milestones[finished_round - 1]
        members = sorted(history.unfinished(), key=lambda trial: (self._score(trial, milestone), trial.number))
        count = max(1, math.floor(len(members) * QUANTILE))
        best = [trial for trial in members[:count] if math.isfinite(self._score(trial, milestone))]
        lost = [trial for trial in members if not math.isfinite(self._score(trial, milestone))]
        worst = [trial for trial in members[-count:] if trial not in best and trial not in lost] + lost
        if not best:
            return []
        exploits = []
        for trial in sorted(worst, key=lambda trial: trial.number):
            draws = generator(self.settings.seed, "population", finished_round, trial.number)
            parent = draws.choice(best)
            params = perturbed(self.space, parent.params, draws)
            exploits.append(Exploit(trial.number, parent.number, milestone, params))
        return exploits

    def _score(self, trial: Trial, milestone: int) -> float:
        seen = trial.at(milestone)
        value = self.settings.objective.sign * seen.values[0] if seen else math.inf
        return value if math.isfinite(value) else math.inf


def perturbed(space: Space, params: Params, draws: Random) -> Params:
    """Another point near `params`: each setting drawn anew now and then, else scaled (a choice: moved to a neighbour).

    A setting that exists under a condition is drawn anew where the condition has just come true, and goes where not.
    """
    changed: Params = {}
    for axis in space.axes:
        if axis.exists(changed):
            keeps = axis.path in params and draws.random() >= RESAMPLES
            changed[axis.path] = _near(axis.domain, params[axis.path], draws) if keeps else axis.domain.sample(draws)
    return changed


def _near(domain: Domain, value: Value, draws: Random) -> Value:
    if isinstance(domain, Choice):
        options = list(domain.values)
        index = options.index(value) + draws.choice((-1, 1))
        return options[min(max(index, 0), len(options) - 1)]
    assert isinstance(value, (int, float))
    scaled = min(max(value * draws.choice(FACTORS), domain.low), domain.high)
    if isinstance(domain, Int):
        steps = min(round((scaled - domain.low) / domain.step), (domain.high - domain.low) // domain.step)
        return domain.low + steps * domain.step
    return scaled
