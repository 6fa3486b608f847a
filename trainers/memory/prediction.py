"""Footprint: the memory of one worker of a run, by component, for every micro-batch; predicted, nothing allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from trainers.config import Phase, RunConfig
from trainers.deepspeed_config import ds_config
from trainers.memory.calibration import Calibration
from trainers.memory.fit import Memory, worker_rows
from trainers.memory.phase_key import phase_key
from trainers.memory.recorder import ACTIVATIONS, GRADIENTS, LOGITS, WORKING
from trainers.memory.small_build import Kernels
from trainers.memory.structure import StateBytes, Structure, read_structure
from trainers.memory.timeline import Timeline, read_timeline
from trainers.memory.words import FP32, Spread, Words, spread_of, update_bytes, words_of
from trainers.objectives import build_objective
from trainers.run import EVALUATION_ROWS

Device = Literal["cpu", "cuda", "mps"]
Moment = Literal["training", "update", "evaluation"]


@dataclass(frozen=True)
class Components:
    """Bytes of one worker at its heaviest moment."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """what layers keep for the backward pass, or pass on"""
    logits: int
    """of the head and the loss, their gradients included"""
    working: int
    """what lives only while a layer computes"""
    runtime_state: int
    """what a recurrent model carries"""
    snapshot: int
    """the copy that a save in the background writes from; on a GPU it lies in the host's memory"""
    framework: int
    """the process, its libraries and the allocator"""
    moment: Moment

    @property
    def tensors(self) -> int:
        """All but the framework."""
        return self.total - self.framework

    @property
    def total(self) -> int:
        return sum(value for value in asdict(self).values() if isinstance(value, int))

    def parts(self) -> Iterator[tuple[str, int]]:
        """Name and bytes, in order."""
        for each in fields(self):
            if each.name != "moment":
                yield each.name, getattr(self, each.name)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class PhaseFootprint:
    """One worker in one phase of a run."""

    config: RunConfig
    phase: Phase
    structure: Structure
    timeline: Timeline
    calibration: Calibration
    device: Device

    def at(self, rows: int, accumulation: int) -> Components:
        """The heaviest moment with `accumulation` micro-batches of `rows` rows a step."""
        moments = (self._training(rows, accumulation), self._update(), self._scoring())
        heaviest = max(moments, key=lambda moment: moment.total)
        state_rows = max(rows * accumulation, EVALUATION_ROWS)
        heaviest = replace(heaviest, runtime_state=state_rows * self.structure.state_row_bytes)
        return replace(heaviest, framework=self.calibration.framework_bytes(heaviest.tensors))

    # ---- what stands all the time -------------------------------------------------------------------------

    @cached_property
    def words(self) -> Words:
        return words_of(self.config.precision, self.phase.optim)

    @cached_property
    def spread(self) -> Spread:
        return spread_of(self.config, self.device)

    @cached_property
    def state(self) -> StateBytes:
        return self.structure.state_bytes(self.phase.optim, self.words, self.spread)

    @cached_property
    def _standing(self) -> Components:
        saved = self.structure.snapshot_bytes(self.phase.optim, self.words)
        snapshot = self.spread.saved(saved) if self.device != "cuda" else 0
        return Components(self.state.weights, 0, self.state.optimizer, 0, 0, 0, 0, snapshot, 0, "update")

    @cached_property
    def _gradient_share(self) -> float:
        """Of the gradients as the timeline has them, what this worker's engine holds."""
        return self.state.gradients / self.structure.state_bytes(self.phase.optim, self.words).gradients

    @property
    def _layers(self) -> int:
        return self.config.model.n_layers

    # ---- what the engine takes besides ---------------------------------------------------------------------

    @cached_property
    def _gathered_in_training(self) -> int:
        """Slices made whole: the layer at work, the next one, and what belongs to no layer."""
        words = self.spread.words(self.words)
        return 2 * self.structure.layer_bytes(words) + self.structure.outer_bytes(words) if self.spread.gathers else 0

    @cached_property
    def _gathered_in_evaluation(self) -> int:
        """An evaluation computes with a copy of all weights on each worker (`Engine.whole`)."""
        return self.structure.weight_bytes(self.spread.words(self.words)) if self.spread.gathers else 0

    @cached_property
    def _bucket(self) -> int:
        """In which ZeRO gathers gradients before it sends them; a CPU takes memory only for the part that is filled."""
        if self.config.engine != "deepspeed" or not self.spread.stage:
            return 0
        values: int = ds_config(self.config, self.phase.optim)["zero_optimization"]["reduce_bucket_size"]
        if self.device == "cpu":
            values = min(values, self.structure.values)
        return self.spread.words(self.words).gradients.bytes(values)

    @cached_property
    def _updating(self) -> int:
        trained = self.structure.trained(self.words)
        taken = update_bytes(self.phase.optim, self.words, trained)
        if self.spread.master:  # ZeRO makes fp32 copies of the gradients of its slices
            taken += FP32.bytes(sum(trained))
        return self.spread.part("optimizer", taken)

    # ---- the three moments --------------------------------------------------------------------------------

    def _training(self, rows: int, accumulation: int) -> Components:
        # DistributedDataParallel holds the gradients in its buckets from the beginning
        standing = accumulation > 1 or self.config.workers > 1
        living = self.timeline.peak(rows, self._layers, accumulates=standing)
        compiled = self.calibration.compiled if self.config.compile else 1.0
        share = 1.0 if accumulation > 1 and self.spread.adds_whole else self._gradient_share
        return replace(
            self._standing,
            gradients=math.ceil(living[GRADIENTS] * share),
            activations=math.ceil(living[ACTIVATIONS] * compiled),
            logits=math.ceil(living[LOGITS]),
            working=math.ceil(living[WORKING] * compiled) + self._gathered_in_training + self._bucket,
            moment="training",
        )

    def _update(self) -> Components:
        return replace(self._standing, gradients=self.state.gradients, working=self._updating)

    def _scoring(self) -> Components:
        config = self.config
        limit = config.evaluation.max_tokens
        rows = EVALUATION_ROWS if limit is None else min(EVALUATION_ROWS, math.ceil(limit / config.sequence_length))
        living = self.timeline.scoring_peak(rows, self._layers)
        gradients = self.state.gradients if config.workers > 1 else 0
        return replace(
            self._standing,
            gradients=gradients,
            activations=math.ceil(living[ACTIVATIONS]),
            logits=math.ceil(living[LOGITS]),
            working=math.ceil(living[WORKING]) + self._gathered_in_evaluation,
            moment="evaluation",
        )


@dataclass(frozen=True)
class Footprint:
    """One worker of a run, on one kind of device, over all phases: the first worker, which gathers what is saved."""

    config: RunConfig
    structure: Structure
    calibration: Calibration
    phases: tuple[PhaseFootprint, ...]
    """those that may differ in memory"""

    def at(self, rows: int, accumulation: int | None = None) -> Components:
        """The heaviest moment of the heaviest phase with `rows` rows a micro-batch.

        accumulation: None: what the batch then needs.
        """
        if accumulation is None:
            accumulation = math.ceil(worker_rows(self.config) / rows)
        return max((phase.at(rows, accumulation) for phase in self.phases), key=lambda parts: parts.total)

    def peak_bytes(self, rows: int, accumulation: int | None = None) -> int:
        return self.at(rows, accumulation).total

    def memory(self, limit_bytes: int) -> Memory:
        """The question that `fit` answers."""
        return Memory(limit_bytes, self.peak_bytes)

    @cached_property
    def checkpoint_bytes(self) -> int:
        """The tensor files of a checkpoint, of the phase that has the largest."""
        return max(self.structure.checkpoint_bytes(phase.phase.optim, phase.words) for phase in self.phases)


# ---- read off a configuration ---------------------------------------------------------------------------------

Timelines = tuple[Timeline, ...]
"""of each phase"""


def read_footprint(
    config: RunConfig, vocab_size: int, device: Device, calibration: Calibration, *, timeline: Timelines | None = None
) -> Footprint:
    """The Footprint of a configuration whose tokenizer has `vocab_size` tokens.

    `timeline`: what `timeline_of` said of a configuration that differs in neither model, length nor precision.
    """
    structure = read_structure(config.model, vocab_size)
    timelines = timeline or timeline_of(config, vocab_size, device)
    phases: list[PhaseFootprint] = []
    for phase, its in zip(config.resolved_phases(), timelines, strict=True):
        known = ((each.timeline, each.phase.optim) for each in phases)
        if not any(its is other and phase.optim == optim for other, optim in known):
            phases.append(PhaseFootprint(config, phase, structure, its, calibration, device))
    return Footprint(config, structure, calibration, tuple(phases))


def timeline_of(config: RunConfig, vocab_size: int, device: Device) -> Timelines:
    """What training `config` allocates on `device`, read off small builds: one for all phases that are alike."""
    kernels: Kernels = "cuda" if device == "cuda" else "cpu"
    seen: dict[tuple[Any, ...], Timeline] = {}
    for phase in config.resolved_phases():
        if (key := phase_key(config, phase)) not in seen:
            seen[key] = read_timeline(
                phase.model,
                phase.model.vocab_size or vocab_size,
                sequence_length=config.sequence_length,
                precision=config.precision,
                objective=build_objective(config, phase),
                kernels=kernels,
            )
    return tuple(seen[phase_key(config, phase)] for phase in config.resolved_phases())
