"""Calibration: what a device adds to the tensors, learnt from runs that were measured; a file of JSON.

Imports torch only where it is asked for "cuda", to learn the card's name.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

FILE = "memory.json"
MIB = 1 << 20
KEPT = 64  # measurements of a device: the oldest are forgotten
FEWEST = 3  # measurements of memory from which the constant is theirs
IN_THE_PROCESS = ("cpu", "mps")  # devices whose memory is the process's
SEVERAL_SIZES = ("a100", "v100")  # cards of one name that come with more than one memory
NO_PART_OF_A_NAME = re.compile(r"\b(nvidia|geforce|tesla|quadro|gpu|sxm\d?|pcie|nvl|hbm\d\w?)\b|\brtx(?=[\s_-]*a\d)")


@dataclass(frozen=True)
class Sample:
    """One run that was measured."""

    what: str
    """for a person: preset, precision, rows"""
    tensor_bytes: int
    """predicted: all but what the device adds"""
    measured_bytes: int | None
    """at most: of the whole process on the CPU, of what the allocator held on CUDA; None: only its speed counts"""
    flops_per_s: float | None = None
    """model FLOPs a second, over the whole step"""
    speed_of: str = ""
    """precision and whether compiled: what a speed is for, such as `bf16 compiled`"""
    process_bytes: int | None = None
    """of `measured_bytes`, what the process took before its model was built; None: as much as is usual"""


@dataclass(frozen=True)
class Calibration:
    """What one kind of device adds."""

    device: str
    """as `device_key` names it"""
    process_bytes: int
    """of a worker before its model is built: Python, torch, Ray and their libraries; on CUDA the context"""
    constant_bytes: int
    """that working adds beside the tensors: thread pools, kernels' own buffers, the allocator's leftovers"""
    factor: float = 1.0
    """memory taken for each byte of tensors: the allocator's rounding and what it cannot use again"""
    compiled: float = 1.0
    """activations of a compiled model beside those of an eager one"""
    measured_on: str = ""
    """the date of the last sample that the constant is the median of; empty: the values are what is usual"""
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

    @property
    def unseen_bytes(self) -> int:
        """The part of `process_bytes` that no measurement has: the context of a card, outside of the allocator."""
        return 0 if self.device in IN_THE_PROCESS else self.process_bytes

    def seen_process(self, own_bytes: int | None) -> int:
        """The part of a measurement that the process took before its model: its own where that is known."""
        return own_bytes or self.process_bytes - self.unseen_bytes

    def refined(self, sample: Sample, date: str) -> Calibration:
        """This one with a further measurement; the constant is the median of what the samples leave to it."""
        samples = (*self.samples, sample)[-KEPT:]
        left = [
            each.measured_bytes - self.seen_process(each.process_bytes) - self.factor * each.tensor_bytes
            for each in samples
            if each.measured_bytes is not None
        ]
        if len(left) < FEWEST or sample.measured_bytes is None:
            return replace(self, samples=samples)
        constant = max(0, round(statistics.median(left)))
        return replace(self, samples=samples, constant_bytes=constant, measured_on=date)


USUAL = {
    "cpu": Calibration("cpu", process_bytes=440 * MIB, constant_bytes=100 * MIB),
    "cuda": Calibration("cuda", process_bytes=480 * MIB, constant_bytes=70 * MIB, factor=1.04),
    "mps": Calibration("mps", process_bytes=330 * MIB, constant_bytes=200 * MIB),
}
"""What is assumed of a device that has not been measured: on CUDA the context, cuBLAS's workspace and fragmentation"""


def card_key(name: str) -> str:
    """One name of a card for the driver's and a person's: `NVIDIA A100-SXM4-40GB` and `a100-40` are `a100-40`."""
    words = re.split(r"[\s_-]+", NO_PART_OF_A_NAME.sub(" ", name.lower()).strip(" _-"))
    memory = re.fullmatch(r"(\d{1,3})(gb)?", words[-1]) if len(words) > 1 else None
    family = "".join(words[:-1] if memory else words)
    return f"{family}-{memory[1]}" if memory and family in SEVERAL_SIZES else family


def device_key(device: str) -> str:
    """What a device's measurements are kept under: cpu, mps or its card's name; `cuda` is the card that is here."""
    kind = device.split(":")[0]
    if kind in IN_THE_PROCESS:
        return kind
    return _card_here() if kind == "cuda" else card_key(device)


@cache
def _card_here() -> str:
    import torch

    return card_key(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cuda"


def calibration_of(device: str, folder: Path | None) -> Calibration:
    """What is known of `device` (cpu, cuda, mps or a card's name), else what is usual.

    What cannot be read is taken for nothing: it only ever sharpens a prediction.
    """
    key = device_key(device)
    usual = USUAL.get(key) or replace(USUAL["cuda"], device=key)
    stored = None if folder is None else _read(folder).get(key)
    if stored is None:
        return usual
    try:
        return replace(TypeAdapter(Calibration).validate_python(stored), device=key)
    except ValidationError:
        return usual


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
