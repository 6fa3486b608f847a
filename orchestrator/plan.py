"""What a run will do, before it does it: steps, tokens, checkpoints and disk, from the configuration and the text.

`derive_plan` is pure; `plan_run` takes its numbers from prepared data, `survey_plan.py` from a bounded sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trainers.budget import evaluation_interval, phase_steps, saving_interval
from trainers.config import CheckpointConfig, OptimConfig, Phase, RunConfig
from trainers.errors import DataError
from trainers.memory.words import optimizer_values, spread_of, words_of
from trainers.schedules import endless_warmup

if TYPE_CHECKING:
    from trainers.data.packed import PackedTokens
    from trainers.data.stream import StreamedSource
    from trainers.data.types import PreparedData
    from trainers.memory.structure import Structure

BYTES_PER_VALUE = 4  # weights and moments are kept in fp32 under every compute precision


@dataclass(frozen=True)
class PhasePlan:
    """One phase in all three clocks."""

    name: str
    steps: int
    tokens: int
    """inputs trained on: steps x tokens_per_step"""
    epochs: float | None
    """passes over its text; None for a stream"""
    steps_per_epoch: int | None
    evaluations: int


@dataclass(frozen=True)
class RunPlan:
    """A whole run; sizes in bytes."""

    parameters: int
    phases: tuple[PhasePlan, ...]
    total_steps: int
    total_tokens: int
    checkpoint_bytes: int
    """one checkpoint: weights and optimizer state"""
    scheduled_checkpoints: int
    """by checkpoint.every_steps, every_epochs, at each phase's end; those by the clock or for a new best come on top"""
    kept_checkpoints: int
    """on the disk when the run has ended, at most"""
    disk_bytes: int
    """of checkpoints at the worst moment: those kept and the one being written"""
    snapshot_bytes: int
    """memory that a save in the background copies the state into"""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StateSizes:
    """Bytes of a phase's training state in one worker."""

    training_bytes: int
    """weights, gradients, optimizer state"""
    checkpoint_bytes: int
    snapshot_bytes: int

    @staticmethod
    def plain(parameters: int, optim: OptimConfig) -> StateSizes:
        """All of it in fp32, without the few bytes of headers and counters."""
        values = optimizer_values(optim)
        saved = parameters * BYTES_PER_VALUE * (1 + values)
        return StateSizes(parameters * BYTES_PER_VALUE * (2 + values), saved, saved)


def derive_plan(
    config: RunConfig,
    *,
    parameters: int,
    steps_per_epoch: Sequence[int | None],
    sizes: Sequence[StateSizes] | None = None,
) -> RunPlan:
    """The plan of `config` for a model of `parameters` values, with the length of each phase's text in steps.

    `sizes`: of each phase's state; None: as plain fp32 takes them.

    Raises ConfigError for epochs of a stream, DataError for a text shorter than one step.
    """
    specs = config.resolved_phases()
    assert len(specs) == len(steps_per_epoch)
    phases = tuple(plan_phase(config, spec, length) for spec, length in zip(specs, steps_per_epoch, strict=True))
    sizes = sizes or [StateSizes.plain(parameters, spec.optim) for spec in specs]
    one = max(each.checkpoint_bytes for each in sizes)
    scheduled = scheduled_checkpoints(phases, config.checkpoint)
    kept = kept_checkpoints(config, scheduled, evaluations=sum(phase.evaluations for phase in phases))
    return RunPlan(
        parameters=parameters,
        phases=phases,
        total_steps=sum(phase.steps for phase in phases),
        total_tokens=sum(phase.tokens for phase in phases),
        checkpoint_bytes=one,
        scheduled_checkpoints=scheduled,
        kept_checkpoints=kept,
        disk_bytes=one * (kept + 1),
        snapshot_bytes=max(each.snapshot_bytes for each in sizes),
    )


def plan_run(config: RunConfig, data: PreparedData) -> RunPlan:
    """The plan of `config` on its packed text."""
    from trainers.memory.structure import read_structure

    structure = read_structure(config.model, data.tokenizer.vocab_size)
    lengths = [steps_per_epoch(config, [packed_tokens(source) for source in phase.sources]) for phase in data.phases]
    sizes = [state_sizes(structure, config, phase.optim) for phase in config.resolved_phases()]
    return derive_plan(config, parameters=structure.values, steps_per_epoch=lengths, sizes=sizes)


def state_sizes(structure: Structure, config: RunConfig, optim: OptimConfig) -> StateSizes:
    """What a worker of `config` holds, on its device or in its host's memory, and saves."""
    words, spread = words_of(config.precision, optim), spread_of(config, "cpu")
    state = structure.state_bytes(optim, words, spread)
    return StateSizes(
        training_bytes=state.weights + state.gradients + state.optimizer,
        checkpoint_bytes=structure.checkpoint_bytes(optim, words),
        snapshot_bytes=structure.snapshot_bytes(optim, words),
    )


def planned_phases(config: RunConfig, data: PreparedData) -> tuple[PhasePlan, ...]:
    """Each phase on its packed text; imports no torch."""
    lengths = [steps_per_epoch(config, [packed_tokens(source) for source in phase.sources]) for phase in data.phases]
    specs = config.resolved_phases()
    return tuple(plan_phase(config, spec, length) for spec, length in zip(specs, lengths, strict=True))


def warmups_beyond_epochs(config: RunConfig, phases: Sequence[PhasePlan]) -> Iterator[str]:
    """A sentence for each warm-up that is longer than a budget in epochs; others are told without the text."""
    for spec, phase in zip(config.resolved_phases(), phases, strict=True):
        note = endless_warmup(spec.schedule, phase.steps) if spec.budget.epochs is not None else None
        if note is not None:
            yield note


def packed_tokens(source: PackedTokens | StreamedSource) -> int | None:
    """Tokens of a source; None for a stream, whose length nobody knows."""
    tokens = getattr(source, "tokens", None)
    return None if tokens is None else len(tokens)


def steps_per_epoch(config: RunConfig, tokens: Sequence[int | None]) -> int | None:
    """Whole steps in one pass over sources of so many tokens: rows never cross from one source to another, and each
    needs one token more than it has inputs. None where a source is a stream."""
    rows = 0
    for n in tokens:
        if n is None:
            return None
        rows += max(0, n - 1) // config.sequence_length
    return rows // config.sequences_per_step


def plan_phase(config: RunConfig, spec: Phase, steps_per_epoch: int | None) -> PhasePlan:
    """One phase, whose text makes `steps_per_epoch` steps (None: a stream)."""
    if steps_per_epoch == 0:
        raise DataError(
            f"phase {spec.name!r}: the training text is shorter than one step of {config.sequences_per_step} sequences "
            f"of {config.sequence_length} tokens. Use more text, or lower batch.sequences or data.sequence_length."
        )
    steps = phase_steps(spec.budget, tokens_per_step=config.tokens_per_step, steps_per_epoch=steps_per_epoch)
    interval = evaluation_interval(config.evaluation, steps_per_epoch) or _steps_of_tokens(config)
    return PhasePlan(
        name=spec.name,
        steps=steps,
        tokens=steps * config.tokens_per_step,
        epochs=None if steps_per_epoch is None else steps / steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        evaluations=1 + ((steps - 1) // interval if interval else 0),
    )


def _steps_of_tokens(config: RunConfig) -> int | None:
    """Steps between two evaluations that come by tokens."""
    every = config.evaluation.every_tokens
    return None if every is None else max(1, every // config.tokens_per_step)


def flops_per_token(config: RunConfig, parameters: int) -> int:
    """6 N + 12 L d T: forward and backward, attention's products in full (PaLM, arXiv:2204.02311, appendix B)."""
    return 6 * parameters + 12 * config.model.n_layers * config.model.d_model * config.sequence_length


def scheduled_checkpoints(phases: Sequence[PhasePlan], saving: CheckpointConfig) -> int:
    """Distinct steps at which a save is certain: the end of each phase, multiples of every_steps over the whole run,
    and those of every_epochs inside each phase whose text has a known length."""
    count = at = 0
    for phase in phases:
        count += _saves(at, phase.steps, saving.every_steps, saving_interval(saving, phase.steps_per_epoch))
        at += phase.steps
    return count


def _saves(before: int, steps: int, over_the_run: int | None, inside: int | None) -> int:
    """Saves in a phase of `steps` steps that begins after step `before` of the run; arithmetic, however long it is."""
    end = before + steps
    count = 0
    if over_the_run is not None:
        count += end // over_the_run - before // over_the_run
    if inside is not None:
        count += steps // inside
    if over_the_run is not None and inside is not None:
        count -= _coincidences(before, steps, over_the_run, inside)
    on_the_end = (over_the_run is not None and end % over_the_run == 0) or (inside is not None and steps % inside == 0)
    return count + (not on_the_end)


def _coincidences(before: int, steps: int, over_the_run: int, inside: int) -> int:
    """How many j in 1..steps // inside make before + j * inside a multiple of `over_the_run` (a linear congruence)."""
    common = math.gcd(over_the_run, inside)
    if before % common:
        return 0
    period = over_the_run // common
    first = -(before // common) * pow(inside // common, -1, period) % period
    return (steps // inside - first) // period - (-first) // period


def kept_checkpoints(config: RunConfig, scheduled: int, *, evaluations: int) -> int:
    """How many stand on the disk at the end, at most: the last few, and the best besides."""
    if config.checkpoint.every_minutes is None:
        written = scheduled + (evaluations if config.checkpoint.save_best else 0)
    else:
        written = config.checkpoint.keep_last_n + 1  # however long the run takes
    return min(written, config.checkpoint.keep_last_n + (1 if config.checkpoint.save_best else 0))
