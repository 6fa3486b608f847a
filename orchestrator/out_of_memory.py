"""What is done about a run that ran out of memory: it is explained with the plan's numbers, or it goes on smaller."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.console import size
from orchestrator.experiment import Experiment, Request, cache_dir
from orchestrator.worker import OUT_OF_MEMORY
from trainers.config import RunConfig
from trainers.memory.calibration import calibration_of
from trainers.memory.fit import DoesNotFit, Memory, fit

if TYPE_CHECKING:
    from trainers.memory.prediction import Components, Device

LARGEST = 4  # components that are named


def accident_of(outcome: Mapping[str, Any] | None) -> str | None:
    """What was said when the run ran out of memory; None where it did not."""
    if outcome is None or outcome["state"] != "failed":
        return None
    kind, _, text = str(outcome["reason"]).partition(": ")
    return text if kind == OUT_OF_MEMORY else None


def shrunk(config: RunConfig) -> RunConfig | None:
    """`config` with half the micro-batch and twice the accumulation; None where one row is all there is."""
    try:
        batch = fit(config, Memory.below(config.micro_sequences))
    except DoesNotFit:
        return None
    return RunConfig.model_validate(config.model_dump() | {"batch": batch.model_dump()})


def explain(
    experiment: Experiment, request: Request, vocab_size: int, device: Device, outcome: Mapping[str, Any]
) -> str:
    """What it needed, of what, and the command that goes on."""
    from trainers.memory.prediction import read_footprint

    config = experiment.config
    footprint = read_footprint(config, vocab_size, device, calibration_of(device, cache_dir(request.runs_dir)))
    parts = footprint.at(config.micro_sequences, config.accumulation)
    limit = request.memory_limit
    there = f", and the limit is {size(limit)} (--memory-limit)" if limit is not None else ""
    what = (
        f"{config.preset} ran out of memory at step {outcome.get('step', 0)} with {config.micro_sequences} rows at a "
        f"time ({accident_of(outcome)}). The plan for it: {size(parts.total)} in each worker at most, in "
        f"{parts.moment} ({_named(parts)}){there}."
    )
    smaller = _smaller(config, footprint.peak_bytes, limit)
    if smaller is None:
        return (
            f"{what} Not even one row at a time fits. Start a new run with model.activation_checkpointing=true, a "
            f"shorter data.sequence_length or a smaller model: `{_command('plan', experiment, request)} --variants`."
        )
    again = _command("train", experiment, request)
    return (
        f"{what} The same training in smaller pieces ({smaller.accumulation} micro-batches a step) goes on from its "
        f"last checkpoint: {again} batch.micro_sequences={smaller.micro_sequences}\n"
        f"or finds the size by itself: {again} --on-oom shrink"
    )


def _smaller(config: RunConfig, peak_bytes: Any, limit: int | None) -> RunConfig | None:
    """The largest micro-batch below the one that failed and, as far as is predicted, within the limit."""
    half = shrunk(config)
    if half is None or limit is None:
        return half
    known = config.micro_sequences

    def peak(rows: int, accumulation: int) -> float:
        return float(peak_bytes(rows, accumulation)) if rows < known else float("inf")

    try:
        batch = fit(config, Memory(limit, peak))
    except DoesNotFit:
        return half  # it is a prediction; what is certain is that the present size is too large
    return RunConfig.model_validate(config.model_dump() | {"batch": batch.model_dump()})


def _named(parts: Components) -> str:
    largest = sorted(parts.parts(), key=lambda part: -part[1])[:LARGEST]
    return ", ".join(f"{name.replace('_', ' ')} {size(value)}" for name, value in largest if value)


def _command(verb: str, experiment: Experiment, request: Request) -> str:
    words = ["orchestrate", verb, experiment.name]
    if request.runs_dir != Path("runs").absolute():
        words += ["--runs-dir", str(request.runs_dir)]
    if request.memory_limit is not None and verb == "train":
        words += ["--memory-limit", f"{request.memory_limit}B"]
    return shlex.join(words)
