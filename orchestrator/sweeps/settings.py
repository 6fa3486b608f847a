"""SweepSettings: what makes a sweep this sweep, beside the configuration it varies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainers.errors import ConfigError

METRICS = (
    "val/loss", "val/perplexity", "val/bits_per_byte", "val/bits_per_character", "val/accuracy",
    "train/loss", "perf/tokens_per_s", "mem/peak_gib",
)  # fmt: skip
"""what a trial reports at an evaluation"""
MOST_TOKENS = 10**18
"""of a training, beyond any: what stands for its tokens until the text is read"""
OPTIONS = {"objectives": "--objective", "seed": "--search-seed"}
"""where the command line says it in another word"""


class Objective(BaseModel):
    """A metric of the trials and which way is better."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str = "val/loss"
    mode: Literal["min", "max"] = "min"

    @field_validator("metric")
    @classmethod
    def _is_reported(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ValueError(f"{metric!r} is never reported at an evaluation; there are {', '.join(METRICS)}.")
        return metric

    @property
    def sign(self) -> float:
        """Multiplied with it, less is better."""
        return 1.0 if self.mode == "min" else -1.0


class SweepSettings(BaseModel):
    """Frozen and JSON both ways; part of the sweep's fingerprint and of its MLflow run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    space: list[dict[str, Any]]
    """search_spaces.space.Space.to_json()"""
    space_name: str = "custom"
    searcher: Literal["grid", "random", "tpe", "multi"] = "tpe"
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = "asha"
    trials: Annotated[int, Field(gt=0, le=100_000)]
    """points of the space; a grid has as many as its cells"""
    grid_points: Annotated[int, Field(gt=0)] = 3
    """values of each continuous axis on a grid"""
    seeds: Annotated[int, Field(gt=0, le=1000)] = 1
    """trainings of each point; decisions are taken on their mean"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """of the searcher; the trainings have the configuration's own"""
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = (Objective(),)
    tokens: Annotated[int, Field(gt=0)]
    """that each training gets, whatever its batch size"""
    evaluations: Annotated[int, Field(gt=0)] = 9
    """of each training, evenly spaced in tokens"""
    reduction: Annotated[int, Field(gt=1)] = 3
    """asha and hyperband: of so many trials at a rung one goes on"""
    grace: Annotated[int, Field(gt=0, le=MOST_TOKENS)] | None = None
    """tokens before anything is stopped; None: the first evaluation"""
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    """how optim.lr follows batch.sequences; the searched or configured lr is then that of the base batch"""
    cpus_per_trial: Annotated[int, Field(gt=0)] = 1
    """threads of a worker change the bits, so they are part of the sweep"""

    @model_validator(mode="after")
    def _fits_together(self) -> SweepSettings:
        several = len(self.objectives) > 1
        if several != (self.searcher == "multi"):
            raise ValueError(
                f"searcher={self.searcher} takes {'several objectives' if not several else 'one objective'}: "
                f"give --objective {'twice' if not several else 'once'}, or choose another --searcher."
            )
        twice = [
            one.metric for one in self.objectives if [each.metric for each in self.objectives].count(one.metric) > 1
        ]
        if twice:
            raise ValueError(f"--objective {twice[0]} is given twice: each objective is a metric of its own.")
        if self.scheduler == "pbt" and (self.seeds > 1 or several or self.searcher == "grid"):
            raise ValueError(
                "scheduler=pbt changes a trial's settings while it trains, so it goes with one seed, one objective "
                "and --searcher random or tpe for the first population."
            )
        if self.grace is not None and self.grace > self.tokens:
            raise ValueError(
                f"--grace {self.grace} must not exceed the tokens of a trial ({self.tokens}): lower it, or raise "
                "budget.tokens."
            )
        return self

    @property
    def report_every(self) -> int:
        """Tokens between two evaluations."""
        return -(-self.tokens // self.evaluations)

    @property
    def objective(self) -> Objective:
        """The one that early stopping judges."""
        return self.objectives[0]


def build_settings(draft: Mapping[str, Any], space: list[dict[str, Any]], tokens: int) -> SweepSettings:
    """The settings of a sweep. ConfigError with one line for each problem."""
    try:
        return SweepSettings(**draft, space=space, tokens=tokens)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    causes = [problem for problem in problems if problem["type"] != "too_short"]  # said of a list with a broken entry
    raise ConfigError("\n".join(dict.fromkeys(_problem(problem) for problem in causes or problems)))


def _problem(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    name = str(problem["loc"][0])
    option = OPTIONS.get(name, "--" + name.replace("_", "-"))
    return f"{option}: {problem['msg'].replace('Input should be', 'must be')}, got {problem['input']!r}."
