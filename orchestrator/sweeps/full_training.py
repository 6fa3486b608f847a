"""After the search: the winner trained at full budget, as a run of its own (`tune --then-train`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator import launch
from orchestrator.console import print_json
from orchestrator.experiment import Request, cache_dir, settle
from orchestrator.sweeps.history import Trial
from orchestrator.sweeps.sweep import Sweep, SweepRequest, tokens_of_phases
from orchestrator.sweeps.trials import in_tokens
from orchestrator.sweeps.winner import winning_run
from trainers.config import RunConfig
from trainers.config_io import build_config
from trainers.data.prepare import data_hashes
from trainers.data.types import PreparedData
from trainers.errors import ConfigError
from trainers.presets import PRESETS


def train_winner(
    sweep: Sweep,
    winner: Trial,
    typed: RunConfig,
    data: PreparedData,
    request: SweepRequest,
    document: dict[str, Any] | None = None,
) -> int:
    """Train SWEEP-best from wherever it stands; its exit code. `typed`: the base as the command line said it.

    `document`, of the sweep, is printed as JSON in any case, with the training as its `training` where that ends.
    Raises UserError where another run has that name, an earlier winner's say.
    """
    config = full_run(sweep, winner, typed, data)
    name = f"{sweep.name}-best"
    asked = Request(request.runs_dir, name, verbose=request.verbose, json=request.json, document=document)
    try:
        _refuse_another(config, winner, asked)
        return launch.train(config, asked)
    except BaseException:
        if document is not None:
            print_json(document)
        raise


def _refuse_another(config: RunConfig, winner: Trial, asked: Request) -> None:
    try:
        settle(config, asked, data_hashes(config, cache_dir(asked.runs_dir)))
    except ConfigError as error:
        raise ConfigError(
            f"the sweep is done, and its winner, {winner.name}, cannot train as {asked.name}: {error}"
        ) from None


def full_run(sweep: Sweep, winner: Trial, typed: RunConfig, data: PreparedData) -> RunConfig:
    """The winner's settings on as many tokens as the preset's own budget pays for at the base batch; a configuration
    without a preset has its own budget."""
    full = _with_own_budget(typed)
    full = in_tokens(full, tokens_of_phases(full, data))
    return winning_run(replace(sweep, base=full), winner)


def _with_own_budget(typed: RunConfig) -> RunConfig:
    if typed.preset not in PRESETS:
        return typed
    preset, values = PRESETS[typed.preset]().model_dump(mode="json"), typed.model_dump(mode="json")
    if [phase["name"] for phase in preset["phases"]] != [phase["name"] for phase in values["phases"]]:
        return typed
    for part, own in [(values, preset), *zip(values["phases"], preset["phases"], strict=True)]:
        part["budget"] = own["budget"]
    return build_config(values)
