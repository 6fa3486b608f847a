"""What a plan says of the memory of a trial that has been trained: from the trial's own process to the driver.

A prediction needs torch and some CPU. The process of the trial has imported torch, and a slot is its own; in the driver
it would hold up the trials that are starting or being judged. So the trial's process predicts, after the training, and
writes a file; the driver adds and subtracts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.experiment import OUTCOME, write_atomically
from orchestrator.sweeps.memory import Footprints
from search_spaces.precisions import Device
from trainers.config import RunConfig
from trainers.errors import UserError
from trainers.identity import read_json
from trainers.memory.calibration import Calibration, Sample, calibration_of, refine

FILE = "logs/memory.json"


@dataclass(frozen=True)
class Foreseen:
    """A prediction, as the trial's process wrote it down."""

    device: str
    """as calibrations name it"""
    tensor_bytes: int
    """of one worker at its heaviest moment: all but what the device adds"""
    failed: str = ""
    """why there is none"""


# ---- in the trial's process -------------------------------------------------------------------------------------


def foresee(job: Mapping[str, Any]) -> None:
    """Write down what is predicted of the training of `job`, which has finished, where the job asks for it.

    Never raises: it is for the reader's information, and the trial is over.
    """
    if job.get("vocab_size") is None:
        return
    try:
        found = _foreseen(job)
    except Exception as error:
        found = Foreseen("", 0, f"{type(error).__name__}: {error}"[:300])
    path = Path(job["run_dir"]) / FILE
    with contextlib.suppress(OSError, UserError):  # a full disk: the driver does without
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(asdict(found)) + "\n")


@cache
def _footprints(vocab_size: int, device: Device, cache_dir: str) -> Footprints:
    """Of this process, whatever it trains: the trials of a sweep have few cells of memory between them."""
    return Footprints(vocab_size, device, Path(cache_dir))


def _foreseen(job: Mapping[str, Any]) -> Foreseen:
    config = RunConfig.model_validate(job["config"])
    assert config.device != "auto", "the driver has settled the device"
    footprint = _footprints(job["vocab_size"], config.device, job["cache_dir"]).of(config)
    parts = footprint.at(config.micro_sequences, config.accumulation)
    return Foreseen(footprint.calibration.device, parts.tensors)


# ---- in the driver ----------------------------------------------------------------------------------------------


class TrialFootprints:
    """What the trials of a sweep were predicted to take, as their processes say. Imports no torch."""

    def __init__(self, vocab_size: int, cache_dir: Path, say: Callable[[str], None]):
        self.vocab_size = vocab_size
        """of the tokenizer: what a trial's process needs besides the configuration"""
        self._folder, self._say = cache_dir, say
        self._began: dict[str, Calibration] = {}
        """device -> what was known of it before the first measurement: one sweep predicts by one measure"""
        self._learnt: set[tuple[str, int]] = set()
        self._complained = False

    def of(self, run_dir: Path, config: RunConfig) -> dict[str, float]:
        """mem/predicted_gib of a finished training, and its measurement for the plans to come.

        Empty where nothing was predicted; never raises.
        """
        try:
            return self._of(run_dir, config)
        except Exception as error:
            self._complain(f"{type(error).__name__}: {error}")
            return {}

    def _of(self, run_dir: Path, config: RunConfig) -> dict[str, float]:
        stored = read_json(run_dir / FILE)
        if stored is None:
            return {}
        foreseen = Foreseen(**stored)
        if foreseen.failed:
            self._complain(foreseen.failed)
            return {}
        if foreseen.device not in self._began:
            self._began[foreseen.device] = calibration_of(foreseen.device, self._folder)
        began = self._began[foreseen.device]
        predicted = began.total(foreseen.tensor_bytes) - began.unseen_bytes  # what mem/peak_gib has not either
        metrics = (read_json(run_dir / OUTCOME) or {}).get("metrics") or {}
        measured = metrics.get("mem/reserved_gib", metrics.get("mem/peak_gib"))
        if measured is not None and not config.compile:  # compiling takes memory of its own
            self._learn(foreseen, config, round(measured * 2**30))
        return {"mem/predicted_gib": predicted / 2**30}

    def _learn(self, foreseen: Foreseen, config: RunConfig, measured_bytes: int) -> None:
        """Once for each cell: a long sweep would push what `bench` measured out of the file."""
        cell = (foreseen.device, foreseen.tensor_bytes)
        if cell not in self._learnt:
            self._learnt.add(cell)
            what = f"{config.preset} {config.micro_sequences} rows"
            refine(foreseen.device, self._folder, [Sample(what, foreseen.tensor_bytes, measured_bytes)])

    def _complain(self, why: str) -> None:
        if not self._complained:
            self._complained = True
            self._say(f"mem/predicted_gib is left out where the memory of a trial could not be predicted: {why}")
