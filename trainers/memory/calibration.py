"""Calibration: what a device adds to the tensors, learnt from runs that were measured; a file of JSON. No torch."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

FILE = "memory.json"
MIB = 1 << 20
KEPT = 64  # measurements of a device: the oldest are forgotten
FEWEST = 3  # measurements from which the constant is theirs


@dataclass(frozen=True)
class Sample:
    """One run that was measured."""

    what: str
    """for a person: preset, precision, rows"""
    tensor_bytes: int
    """predicted: all but what the device adds"""
    measured_bytes: int
    """at most, of the whole process on the CPU, of the allocator on CUDA"""
    flops_per_s: float | None = None
    """model FLOPs a second, over the whole step"""
    speed_of: str = ""
    """precision and whether compiled: what a speed is for, such as `bf16 compiled`"""


@dataclass(frozen=True)
class Calibration:
    """What one kind of device adds."""

    device: str
    """cpu, or the name of a card"""
    process_bytes: int
    """of a process before its model is built: Python, torch and their libraries; on CUDA the context"""
    constant_bytes: int
    """that working adds beside the tensors: thread pools, kernels' own buffers, the allocator's leftovers"""
    factor: float = 1.0
    """memory taken for each byte of tensors: the allocator's rounding and what it cannot use again"""
    compiled: float = 1.0
    """activations of a compiled model beside those of an eager one"""
    measured_on: str = ""
    """the date of the last sample; empty: the values are what is usual"""
    samples: tuple[Sample, ...] = field(default=())

    def total(self, tensor_bytes: float) -> int:
        """Memory that so many bytes of tensors take."""
        return math.ceil(self.process_bytes + self.constant_bytes + self.factor * tensor_bytes)

    def framework_bytes(self, tensor_bytes: float) -> int:
        """The part of it that is not tensors."""
        return self.total(tensor_bytes) - math.ceil(tensor_bytes)

    def speed(self, speed_of: str) -> float | None:
        """Model FLOPs a second, the median of what was measured; None where nothing was."""
        known = [each.flops_per_s for each in self.samples if each.flops_per_s and each.speed_of == speed_of]
        return statistics.median(known) if known else None

    def refined(self, sample: Sample, date: str) -> Calibration:
        """This one with a further measurement; the constant is the median of what the samples leave to it."""
        samples = (*self.samples, sample)[-KEPT:]
        known = replace(self, samples=samples, measured_on=date)
        if len(samples) < FEWEST:
            return known
        left = [each.measured_bytes - self.process_bytes - self.factor * each.tensor_bytes for each in samples]
        return replace(known, constant_bytes=max(0, round(statistics.median(left))))


USUAL = {
    "cpu": Calibration("cpu", process_bytes=360 * MIB, constant_bytes=100 * MIB),
    "cuda": Calibration("cuda", process_bytes=0, constant_bytes=550 * MIB, factor=1.04),
    "mps": Calibration("mps", process_bytes=330 * MIB, constant_bytes=200 * MIB),
}
"""What is assumed of a device that has not been measured: on CUDA the context, cuBLAS's workspace and fragmentation"""


def calibration_of(device: str, folder: Path | None) -> Calibration:
    """What is known of `device` (cpu, cuda, mps or a card's name), else what is usual.

    A file that cannot be read is taken for none: it only ever sharpens a prediction.
    """
    usual = USUAL.get(device.split(":")[0]) or replace(USUAL["cuda"], device=device)
    if folder is None:
        return usual
    stored = _read(folder).get(device)
    if stored is None:
        return usual
    return Calibration(**{**stored, "samples": tuple(Sample(**sample) for sample in stored.get("samples", ()))})


def refine(device: str, folder: Path, samples: Iterable[Sample]) -> Calibration:
    """Add measurements to the file; what is known now. The last writer of two at once wins."""
    calibration = calibration_of(device, folder)
    for sample in samples:
        calibration = calibration.refined(sample, time.strftime("%Y-%m-%d"))
    keep(calibration, folder)
    return calibration


def keep(calibration: Calibration, folder: Path) -> None:
    """Write it into the file, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {**_read(folder), calibration.device: asdict(calibration)}
    descriptor, name = tempfile.mkstemp(prefix=f".{FILE}.", dir=folder)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(known, file, indent=1)
    os.replace(name, folder / FILE)


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
