"""Predicted memory of a run in every way that it could be run here or on given GPUs: precision, recompute, ZeRO, batch.

Imports torch where it predicts, never before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cards import gpu_memory
from orchestrator.console import size
from orchestrator.memory_limit import limit_for
from orchestrator.plan import flops_per_token
from orchestrator.variants import ways_to_run
from search_spaces.precisions import precision_of
from trainers.config import BatchConfig, RunConfig
from trainers.config_io import override
from trainers.errors import UserError
from trainers.memory.calibration import Calibration, calibration_of
from trainers.memory.fit import DoesNotFit, fit, worker_rows
from trainers.memory.phase_key import phase_key

if TYPE_CHECKING:
    from trainers.memory.prediction import Components, Device, Footprint, Timelines

MOST_ROWS = 1 << 16
"""of a micro-batch: more are not looked for"""


@dataclass(frozen=True)
class Room:
    """The device that a plan is for."""

    device: Device
    bytes: int
    """of one worker"""
    what: str
    """where the number comes from, for a person"""
    calibration: Calibration


@dataclass(frozen=True)
class MemoryQuestion:
    """What `plan` was asked about memory."""

    gpus: int | None = None
    gpu_memory: str | None = None
    batches: tuple[int, ...] = ()
    """rows of a micro-batch to show; empty: the configured ones"""
    variants: bool = False
    """other precisions, recompute and engines too"""

    @property
    def elsewhere(self) -> bool:
        """It is about GPUs that need not be here."""
        return self.gpus is not None or self.gpu_memory is not None

    def check(self) -> None:
        """Raises UserError for what asks for nothing."""
        if self.gpus is not None and self.gpus < 1:
            raise UserError(f"--gpus {self.gpus}: at least 1.")
        if self.gpus is not None and self.gpu_memory is None:
            raise UserError(
                "--gpus needs --gpu-memory: an amount such as 24GiB, or the name of a card (rtx4090, h100)."
            )
        if any(rows < 1 for rows in self.batches):
            raise UserError("--batch takes rows of a micro-batch, each at least 1, such as --batch 1,2,4.")

    def applied(self, config: RunConfig) -> RunConfig:
        """`config` on so many GPUs."""
        return config if self.gpus is None else override(config, [f"workers={self.gpus}"])

    def room(self, config: RunConfig, calibrations: Path | None) -> Room:
        """The device in question: the GPUs named, or what a worker of the run has here."""
        self.check()
        if self.gpu_memory is not None:
            n_bytes, name = gpu_memory(self.gpu_memory)
            return Room("cuda", n_bytes, name, calibration_of(name, calibrations))
        return _room_here(config, calibrations)


def _room_here(config: RunConfig, calibrations: Path | None) -> Room:
    from trainers.devices import resolve_device

    device = resolve_device(config.device)
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        what = f"free on the {torch.cuda.get_device_name(device)}"
        return Room("cuda", free, what, calibration_of("cuda", calibrations))
    limit = limit_for(device.type, None, config.workers)
    assert limit.bytes is not None
    kind: Device = "mps" if device.type == "mps" else "cpu"
    return Room(kind, limit.bytes, limit.source, calibration_of(kind, calibrations))


@dataclass(frozen=True)
class PlannedCell:
    """One way to run it."""

    config: RunConfig
    footprint: Footprint
    room: Room
    batches: tuple[int, ...]

    @property
    def precision(self) -> str:
        return precision_of(self.config)

    @property
    def recompute(self) -> bool:
        """Activation checkpointing."""
        return self.config.model.activation_checkpointing

    @property
    def engine(self) -> str:
        if self.config.engine == "deepspeed":
            return f"ZeRO-{self.config.deepspeed.zero_stage}"
        return "FSDP2" if self.config.parallel == "fsdp" else "torch"

    @cached_property
    def shown(self) -> tuple[tuple[int, Components], ...]:
        """Rows of a micro-batch and what they take, of those asked for."""
        return tuple((rows, self.footprint.at(rows)) for rows in self.batches)

    @cached_property
    def largest(self) -> int:
        """Rows of the largest micro-batch that fits, whether or not it divides the step; 0: not even one."""
        return largest_that_fits(self.footprint, self.room.bytes)

    @cached_property
    def fitted(self) -> BatchConfig | None:
        """The batch to use; None: not even one row fits."""
        try:
            return fit(self.config, self.footprint.memory(self.room.bytes))
        except DoesNotFit:
            return None

    @cached_property
    def tokens_per_s(self) -> float | None:
        """Of all workers, where this kind of run has been measured on the device."""
        speed = self.room.calibration.speed(speed_of(self.config))
        per_token = flops_per_token(self.config, self.footprint.structure.values)
        return None if speed is None else self.config.workers * speed / per_token

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "activation_checkpointing": self.recompute,
            "engine": self.engine,
            "compile": self.config.compile,
            "workers": self.config.workers,
            "batches": [
                {"micro_sequences": rows, **parts.to_json(), "fits": parts.total <= self.room.bytes}
                for rows, parts in self.shown
            ],
            "largest_micro_batch": self.largest,
            "fitted": None if self.fitted is None else self.fitted.model_dump(),
            "checkpoint_bytes": self.checkpoint_bytes,
            "tokens_per_s": self.tokens_per_s,
        }

    @property
    def checkpoint_bytes(self) -> int:
        return self.footprint.checkpoint_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """All cells, the configured one first."""

    room: Room
    cells: tuple[PlannedCell, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    """cell and reason"""

    def to_json(self) -> dict[str, Any]:
        calibration = self.room.calibration
        return {
            "device": self.room.device,
            "limit_bytes": self.room.bytes,
            "limit_source": self.room.what,
            "calibration": {
                "process_bytes": calibration.process_bytes,
                "constant_bytes": calibration.constant_bytes,
                "factor": calibration.factor,
                "measured_on": calibration.measured_on,
                "samples": len(calibration.samples),
            },
            "cells": [cell.to_json() for cell in self.cells],
            "left_out": [list(each) for each in self.left_out],
        }


def rows_of(text: str | None) -> tuple[int, ...]:
    """The micro-batches that `--batch 1,2,4` names. Raises UserError."""
    if text is None:
        return ()
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--batch takes rows of a micro-batch, such as --batch 1,2,4; got {text!r}.") from None


def plan_memory(
    config: RunConfig,
    vocab_size: int,
    room: Room,
    *,
    batches: Sequence[int] = (),
    variants: bool = True,
) -> MemoryPlan:
    """The memory of `config` and, with `variants`, of every other way to run it that this version has."""
    from trainers.memory.prediction import read_footprint, timeline_of

    rows = tuple(sorted(set(batches))) or (config.micro_sequences,)
    left_out: list[tuple[str, str]] = []
    timelines: dict[tuple[Any, ...], Timelines] = {}
    cells = []
    for cell in ways_to_run(config, room.device, left_out) if variants else (config,):
        key = timeline_key(cell)
        if key not in timelines:
            timelines[key] = timeline_of(cell, vocab_size, room.device)
        footprint = read_footprint(cell, vocab_size, room.device, room.calibration, timeline=timelines[key])
        cells.append(PlannedCell(cell, footprint, room, rows))
    return MemoryPlan(room, tuple(cells), tuple(left_out))


def timeline_key(config: RunConfig) -> tuple[Any, ...]:
    """What a run's timelines depend on, but for the vocabulary and the device."""
    return tuple(phase_key(config, phase) for phase in config.resolved_phases())


def largest_that_fits(footprint: Footprint, limit_bytes: int) -> int:
    """Rows of the largest micro-batch within the limit; 0: none."""
    if footprint.peak_bytes(1) > limit_bytes:
        return 0
    low, high = 1, 2
    while high <= MOST_ROWS and footprint.peak_bytes(high) <= limit_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if footprint.peak_bytes(middle) <= limit_bytes:
            low = middle
        else:
            high = middle
    return low


def speed_of(config: RunConfig) -> str:
    """What a measured speed is for: arithmetic, recompute and compilation."""
    words = [precision_of(config), "recompute" if config.model.activation_checkpointing else ""]
    return " ".join(word for word in (*words, "compiled" if config.compile else "") if word)


def explained(cell: PlannedCell) -> str:
    """A sentence on whether the configured run fits, and what would."""
    rows = cell.config.micro_sequences
    needed = cell.footprint.peak_bytes(rows, cell.config.accumulation)
    what = f"with {rows} row{'s' if rows > 1 else ''} at a time"
    there = f"{size(cell.room.bytes)} ({cell.room.what})"
    if needed <= cell.room.bytes:
        return f"{size(needed)} {what}, of {there}: it fits"
    if cell.fitted is None:
        return f"{size(needed)} needed {what}, of {there}: not even one row fits"
    micro = cell.fitted.micro_sequences
    assert micro is not None
    accumulation = math.ceil(worker_rows(cell.config) / micro)
    return (
        f"{size(needed)} needed {what}, of {there}: set batch.micro_sequences={micro} "
        f"({accumulation} micro-batches a step, the same training)"
    )
