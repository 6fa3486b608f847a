"""From a point of a space to a trial's configuration: virtual axes become ordinary overrides.

Three paths are no fields of RunConfig but names for several of them at once:

- `precision`: fp32, bf16, fp16, int8, int4 (`search_spaces.precisions`)
- `model.shape`: depth and width together, such as `12x768`; `model.d_ff` keeps its ratio to the width
- `phases.NAME.budget.share`: the share of the tokens which the phases before left; the last phase takes the rest
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from search_spaces.domains import Value
from search_spaces.precisions import PRECISIONS
from search_spaces.shapes import ffn_width, parse_shape
from trainers.config import Phase, RunConfig
from trainers.config_io import override
from trainers.errors import ConfigError

PRECISION = "precision"
SHAPE = "model.shape"
SHARE = re.compile(r"phases\.(?P<phase>.+)\.budget\.share")


def trial_config(params: Mapping[str, Value], config: RunConfig) -> RunConfig:
    """`config` with the values of a point. ConfigError, with the way out, where they make no legal run."""
    return override(config, assignments(params, config))


def assignments(params: Mapping[str, Value], config: RunConfig) -> list[str]:
    """The point as `path=value` overrides of the command line, virtual axes resolved."""
    return [f"{path}={json.dumps(value, ensure_ascii=False)}" for path, value in resolve(params, config).items()]


def resolve(params: Mapping[str, Value], config: RunConfig) -> dict[str, Any]:
    """Plain configuration path -> value, for a point that may hold virtual axes. Pure; any part of a point will do.

    ConfigError where the value of a virtual axis means nothing or cannot be had.
    """
    plain: dict[str, Any] = {}
    shares: dict[str, Value] = {}
    for path, value in params.items():
        if path == PRECISION:
            plain |= _precision(value)
        elif path == SHAPE:
            plain |= _shape(value, config)
        elif SHARE.fullmatch(path):
            shares[path] = value
        else:
            plain[path] = value
    return plain | (_phase_budgets(shares, config) if shares else {})


def places(path: str, config: RunConfig) -> tuple[str, ...]:
    """The plain paths that an axis of `path` sets."""
    if path == PRECISION:
        return tuple(dict.fromkeys(place for precision in PRECISIONS.values() for place in precision.sets))
    if path == SHAPE:
        return ("model.n_layers", "model.d_model", "model.d_ff")
    if found := SHARE.fullmatch(path):
        return (f"phases.{phase_index(found['phase'], config)}.budget",)
    head, _, rest = path.partition(".")
    if head == "phases":
        for index, phase in enumerate(config.phases):
            if rest.startswith(f"{phase.name}."):
                return (f"phases.{index}.{rest.removeprefix(phase.name + '.')}",)
    return (path,)


def phase_index(name: str, config: RunConfig) -> int | None:
    """Which phase of `config` is called `name` (or has that number); None: no such phase."""
    for index, phase in enumerate(config.phases):
        if name in (phase.name, str(index)):
            return index
    return None


# ---- the virtual axes -----------------------------------------------------------------------------------


def _precision(value: Value) -> dict[str, Any]:
    precision = PRECISIONS.get(value) if isinstance(value, str) else None
    if precision is None:
        raise ConfigError(f"precision: must be one of {', '.join(PRECISIONS)}, got {value!r}.")
    return dict(precision.sets)


def _shape(value: Value, config: RunConfig) -> dict[str, Any]:
    shape = parse_shape(value)
    if shape is None:
        own = f"{config.model.n_layers}x{config.model.d_model}"
        raise ConfigError(f"{SHAPE}: must be LAYERSxWIDTH, such as {own}, got {value!r}.")
    sets: dict[str, Any] = {"model.n_layers": shape.n_layers, "model.d_model": shape.d_model}
    width = ffn_width(config.model, shape.d_model)
    return sets if width is None else sets | {"model.d_ff": width}


def _phase_budgets(shares: Mapping[str, Value], config: RunConfig) -> dict[str, Any]:
    """The budget of every phase in tokens: a share of what is left for all but the last, which takes the rest.

    A phase without a share keeps its own share of what is left. All but the last are whole steps of the configured
    batch, and the sum is exactly the configured one.
    """
    phases = config.resolved_phases()
    step = config.tokens_per_step
    searched = {shared_phase(path, config): (path, value) for path, value in shares.items()}
    own = [phase_tokens(phase, config) for phase in phases]
    left = sum(own)
    budgets: dict[str, Any] = {}
    for phase, mine in zip(phases[:-1], own, strict=False):
        path, share = searched.get(phase.index, ("", None))
        if share is not None and not (
            isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share < 1
        ):
            raise ConfigError(f"{path}: a share lies between 0 and 1, both excluded, got {share!r}.")
        remaining = sum(own[phase.index :])
        tokens = round(left * (mine / remaining if share is None else share) / step) * step
        if tokens < step or left - tokens < step * (len(phases) - 1 - phase.index):
            raise ConfigError(
                f"{path or f'phases.{phase.name}.budget.share'}={share}: of the {left:,} tokens left, this phase and "
                f"each one after it needs at least one step ({step:,} tokens)."
            )
        budgets[f"phases.{phase.name}.budget.tokens"] = tokens
        left -= tokens
    return budgets | {f"phases.{phases[-1].name}.budget.tokens": left}


def shared_phase(path: str, config: RunConfig) -> int:
    """The number of the phase whose share `path` is. ConfigError where it has none to share."""
    found = SHARE.fullmatch(path)
    assert found is not None
    index = phase_index(found["phase"], config)
    names = [phase.name for phase in config.phases]
    if index is None or len(names) < 2:
        having = f"the phases here are {', '.join(names)}" if names else "this configuration has a single phase"
        raise ConfigError(f"{path}: a share is for one of several phases; {having}.")
    if index == len(names) - 1:
        raise ConfigError(f"{path}: {names[-1]} is the last phase and takes the rest; search the shares of the others.")
    return index


def phase_tokens(phase: Phase, config: RunConfig) -> int:
    """Tokens that the configured budget of `phase` pays for. ConfigError for a budget in epochs."""
    if phase.budget.tokens is not None:
        return phase.budget.tokens
    if phase.budget.steps is not None:
        return phase.budget.steps * config.tokens_per_step
    raise ConfigError(
        f"phases.{phase.name}.budget.epochs={phase.budget.epochs:g}: passes over different texts cannot be traded at "
        f"equal tokens; set phases.{phase.name}.budget.steps or .tokens first."
    )
