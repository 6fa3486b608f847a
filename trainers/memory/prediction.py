"""Footprint: the memory of one worker of a run, by component, for every micro-batch; predicted, nothing allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from trainers.config import Phase, RunConfig
from trainers.memory.calibration import Calibration
from trainers.memory.fit import Memory, worker_rows
from trainers.memory.recorder import ACTIVATIONS, GRADIENTS, LOGITS, WORKING
from trainers.memory.small_build import Kernels
from trainers.memory.structure import StateBytes, Structure, read_structure
from trainers.memory.timeline import Timeline, read_timeline
from trainers.memory.words import Spread, Words, spread_of, update_bytes, words_of
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
class Footprint:
    """One worker of a run, on one kind of device: the first one, which gathers what is saved."""

    config: RunConfig
    phase: Phase
    structure: Structure
    timeline: Timeline
    calibration: Calibration
    device: Device

    def at(self, rows: int, accumulation: int | None = None) -> Components:
        """The heaviest moment with `rows` rows a micro-batch; None: the accumulation that the batch then needs."""
        if accumulation is None:
            accumulation = math.ceil(worker_rows(self.config) / rows)
        moments = (self._training(rows, accumulation), self._update(), self._scoring())
        heaviest = max(moments, key=lambda moment: moment.total)
        state_rows = max(rows * accumulation, EVALUATION_ROWS)
        heaviest = replace(heaviest, runtime_state=state_rows * self.structure.state_row_bytes)
        return replace(heaviest, framework=self.calibration.framework_bytes(heaviest.tensors))

    def peak_bytes(self, rows: int, accumulation: int | None = None) -> int:
        return self.at(rows, accumulation).total

    def memory(self, limit_bytes: int) -> Memory:
        """The question that `fit` answers."""
        return Memory(limit_bytes, self.peak_bytes)

    # ---- what stands all the time -------------------------------------------------------------------------

    @cached_property
    def words(self) -> Words:
        return words_of(self.config.precision, self.phase.optim)

    @cached_property
    def spread(self) -> Spread:
        return spread_of(self.config)

    @cached_property
    def state(self) -> StateBytes:
        return self.structure.state_bytes(self.phase.optim, self.words, self.spread)

    @cached_property
    def _standing(self) -> Components:
        snapshot = self.structure.snapshot_bytes(self.phase.optim, self.words) if self.device != "cuda" else 0
        return Components(self.state.weights, 0, self.state.optimizer, 0, 0, 0, 0, snapshot, 0, "update")

    @cached_property
    def _updating(self) -> int:
        return update_bytes(self.phase.optim, self.words, self.structure.trained(self.words))

    @cached_property
    def _gradient_share(self) -> float:
        """Of the gradients as the timeline has them, what this worker's engine holds."""
        return self.state.gradients / self.structure.state_bytes(self.phase.optim, self.words).gradients

    @cached_property
    def _gathered(self) -> int:
        """Weights of the layer at work and of the next, where a worker holds only its part."""
        spread = self.spread.stage == 3 and self.config.workers > 1
        return 2 * self.structure.layer_bytes(self.spread.words(self.words)) if spread else 0

    @property
    def _layers(self) -> int:
        return self.config.model.n_layers

    # ---- the three moments --------------------------------------------------------------------------------

    def _training(self, rows: int, accumulation: int) -> Components:
        # DistributedDataParallel holds the gradients in its buckets from the beginning
        standing = accumulation > 1 or self.config.workers > 1
        living = self.timeline.peak(rows, self._layers, accumulates=standing)
        compiled = self.calibration.compiled if self.config.compile else 1.0
        return replace(
            self._standing,
            gradients=math.ceil(living[GRADIENTS] * self._gradient_share),
            activations=math.ceil(living[ACTIVATIONS] * compiled),
            logits=math.ceil(living[LOGITS]),
            working=math.ceil(living[WORKING] * compiled) + self._gathered,
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
            working=math.ceil(living[WORKING]) + self._gathered,
            moment="evaluation",
        )


def read_footprint(
    config: RunConfig, vocab_size: int, device: Device, calibration: Calibration, *, timeline: Timeline | None = None
) -> Footprint:
    """The Footprint of a configuration whose tokenizer has `vocab_size` tokens: of its hungriest phase.

    `timeline`: one read for a configuration that differs in neither model, length nor precision.
    """
    phase = hungriest(config)
    structure = read_structure(phase.model, vocab_size)
    timeline = timeline or timeline_of(config, vocab_size, device)
    return Footprint(config, phase, structure, timeline, calibration, device)


def timeline_of(config: RunConfig, vocab_size: int, device: Device) -> Timeline:
    """What training `config` allocates on `device`, read off its small build."""
    phase = hungriest(config)
    kernels: Kernels = "cuda" if device == "cuda" else "cpu"
    return read_timeline(
        phase.model,
        phase.model.vocab_size or vocab_size,
        sequence_length=config.sequence_length,
        precision=config.precision,
        objective=build_objective(config, phase),
        kernels=kernels,
    )


def hungriest(config: RunConfig) -> Phase:
    """The phase that takes the most memory: one without activation checkpointing, with dropout."""
    return max(config.resolved_phases(), key=lambda phase: (not phase.model.activation_checkpointing,
                                                            phase.model.dropout > 0, -phase.index))  # fmt: skip
