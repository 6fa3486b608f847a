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
    assert request.then_train is not None
    config = full_run(sweep, winner, typed, request.then_train, data)
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


def full_run(sweep: Sweep, winner: Trial, typed: RunConfig, own: RunConfig, data: PreparedData) -> RunConfig:
    """The winner's settings on as many tokens as the budgets of `own` pay for at the base batch.

    `own`: the preset, file or run that the command line named, before its settings.
    """
    full = _with_budgets_of(own, typed)
    full = in_tokens(full, tokens_of_phases(full, data))
    return winning_run(replace(sweep, base=full), winner)


def _with_budgets_of(own: RunConfig, typed: RunConfig) -> RunConfig:
    """`typed` itself where its phases are others."""
    given, values = own.model_dump(mode="json"), typed.model_dump(mode="json")
    if [phase["name"] for phase in given["phases"]] != [phase["name"] for phase in values["phases"]]:
        return typed
    for part, was in [(values, given), *zip(values["phases"], given["phases"], strict=True)]:
        part["budget"] = was["budget"]
    return build_config(values)
