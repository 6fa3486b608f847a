"""The configuration of a trial: the base with a point's values, the same tokens, and a cadence that compares.

Pure functions of plain values; no torch, no ray.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from orchestrator.sweeps.history import Params
from orchestrator.sweeps.settings import SweepSettings
from search_spaces.trial import trial_config
from trainers.config import BudgetConfig, RunConfig
from trainers.config_io import build_config, override
from trainers.errors import ConfigError
from trainers.memory.fit import largest_divisor

SAVED_MINUTES = 1.0
"""of training, at most, that a trial whose process is killed trains again; a shorter one saves at its end alone"""


def in_tokens(config: RunConfig, phase_tokens: Sequence[int]) -> RunConfig:
    """`config` with each budget in tokens (`phase_tokens`: of each resolved phase, in order), so that another batch
    size trains on as much text."""
    values = config.model_dump(mode="json")
    own = [index for index, phase in enumerate(config.phases) if phase.budget is not None]
    for index in own:
        values["phases"][index]["budget"] = _tokens(phase_tokens[index])
    if config.budget is not None:
        inherited = [tokens for index, tokens in enumerate(phase_tokens) if index not in own]
        values["budget"] = _tokens(inherited[0])
    return build_config(values)


def _tokens(tokens: int) -> dict[str, int | None]:
    if tokens >= 2**63:
        raise ConfigError(f"a budget of {tokens:.3g} tokens is more than 64 bits count: lower budget.* below {2**63}.")
    return BudgetConfig(steps=None, tokens=tokens, epochs=None).model_dump(mode="json")


def run_of(
    base: RunConfig, params: Params, settings: SweepSettings, *, seed_index: int = 0, micro_limit: int | None = None
) -> RunConfig:
    """The run of one seed of a point. `base` counts its budgets in tokens (`in_tokens`).

    Warm-up and other counts of steps are meant at the base batch and follow the batch size, so that they cover equal
    tokens. `micro_limit` is the largest micro-batch that fits. Raises ConfigError where the point makes no run.
    """
    config = trial_config(params, base)
    scale = config.sequences_per_step / base.sequences_per_step
    changes = _at_equal_tokens(config, scale) | _as_trial(config, base, settings, seed_index, scale)
    micro = micro_batch(config, micro_limit)
    if micro is not None:
        changes["batch.micro_sequences"] = micro
    return override(config, [f"{path}={json.dumps(value)}" for path, value in changes.items()])


def _at_equal_tokens(config: RunConfig, scale: float) -> Params:
    """What is counted in steps, in steps of this batch size."""
    changes: Params = {}
    parts = [("schedule", config.schedule)]
    parts += [(f"phases.{phase.name}.schedule", phase.schedule) for phase in config.phases if phase.schedule]
    for path, schedule in parts:
        if schedule.warmup_steps:
            changes[f"{path}.warmup_steps"] = max(1, round(schedule.warmup_steps / scale))
        if schedule.kind == "step" and schedule.step_unit == "steps":
            changes[f"{path}.step_size"] = schedule.step_size / scale
    return changes


def _as_trial(config: RunConfig, base: RunConfig, settings: SweepSettings, seed_index: int, scale: float) -> Params:
    """What every trial of a sweep has alike, and the learning rate where it follows the batch."""
    changes: Params = {
        "seed": base.seed + seed_index,
        "evaluation.every_tokens": settings.report_every,
        "early_stopping.patience": 0,  # trials compare equal tokens
        "checkpoint.at_evaluations": False,  # a stop saves, the end of a turn and of a round too
        "checkpoint.every_steps": None,
        "checkpoint.every_epochs": None,
        "checkpoint.every_minutes": min(SAVED_MINUTES, base.checkpoint.every_minutes or SAVED_MINUTES),
        "checkpoint.keep_last_n": 1,
        "checkpoint.save_best": False,
        "samples.count": 0,
    }
    parts = [("optim", config.optim)] + [(f"phases.{p.name}.optim", p.optim) for p in config.phases if p.optim]
    for path, optim in parts:
        changes[f"{path}.on_nonfinite"] = "raise"  # a trial that diverges has given its answer
        if settings.lr_rule != "none":
            changes[f"{path}.lr"] = optim.lr * (scale if settings.lr_rule == "linear" else math.sqrt(scale))
    return changes


def micro_batch(config: RunConfig, limit: int | None) -> int | None:
    """The largest micro-batch up to `limit` that divides a worker's share; None leaves the configuration's own."""
    if limit is None:
        return _dividing(config, config.batch.micro_sequences) if config.batch.micro_sequences else None
    return _dividing(config, min(limit, config.batch.micro_sequences or limit))


def _dividing(config: RunConfig, limit: int) -> int:
    share = config.sequences_per_step // config.workers
    if share == 0:
        raise ConfigError(
            f"a batch of {config.sequences_per_step} sequences cannot be shared by {config.workers} workers."
        )
    return largest_divisor(share, limit)
