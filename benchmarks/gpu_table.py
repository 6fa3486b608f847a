"""The bench tables: presets as they are, eager and compiled, each cell in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import torch

from benchmarks.gpu_check import without_paths
from benchmarks.gpu_memory import footprint_of
from benchmarks.gpu_process import Died, OutOfTime, answers
from benchmarks.gpu_rig import CODES, write_text
from orchestrator.plan import flops_per_token
from trainers.batch_probe import MICRO_BATCHES, Job, Probe
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.data.prepare import prepare
from trainers.presets import PRESETS

NAMES = ("fundamentallm/large", "codelm/tiny", "genesis/microscope")
TIMES_LARGER = 4  # micro-batches tried besides the preset's own, in the time that is left
PLAIN_CHARACTERS = 96  # of a preset whose vocabulary is that of its text
LIMIT_BYTES = 8 << 30  # of a process on the CPU, far beyond what a tiny cell takes
EAGER, COMPILED = "eager", "compiled"
H100_FLOPS = 989e12  # dense bf16 of an H100 or H200, as its maker states it

Fate = Literal["ok", "out of memory", "failed", "skipped"]


@dataclass(frozen=True)
class Cell:
    """One way to run a preset."""

    preset: str
    compiled: bool
    larger: bool = False
    """four times the preset's micro-batch"""

    @property
    def way(self) -> str:
        return COMPILED if self.compiled else EAGER


@dataclass(frozen=True)
class Measured:
    """What became of a cell."""

    preset: str
    way: str
    fate: Fate
    reason: str = ""
    rows: int = 0
    """of a micro-batch"""
    sequence_length: int = 0
    tokens_per_s: float | None = None
    step_ms: float | None = None
    """one update with all its micro-batches"""
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    """of tensors, by the plan; of a compiled model as if it were eager"""
    product_flops: float | None = None
    """FLOP/s of a large matrix product of the run's type in the same process"""
    utilisation: float | None = None
    """model FLOPs a second beside those of that product"""
    utilisation_of_h100: float | None = None
    """beside 989 TFLOP/s, on cards of which their maker says so"""

    @property
    def plan_error(self) -> float | None:
        """How far the plan was off, relative; None for a compiled model, of which it does not speak."""
        if self.way != EAGER or self.fate != "ok" or not (self.peak_bytes and self.predicted_bytes):
            return None
        return abs(self.predicted_bytes / self.peak_bytes - 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cells(names: tuple[str, ...] = NAMES) -> list[Cell]:
    """What is measured, in this order: eager takes seconds, compiling minutes; own batches come before larger ones."""
    return [Cell(name, compiled, larger) for compiled in (False, True) for larger in (False, True) for name in names]


@dataclass(frozen=True)
class Table:
    """Measures cells on a device, with texts and packed data in `folder`; `tiny`: small models, in one way."""

    device: str
    folder: Path
    tiny: bool = False

    def measured(self, wanted: list[Cell], seconds: float, say: Callable[[Measured], None]) -> Iterator[Measured]:
        """Every cell, for at most so many seconds; those for which there was no time are skipped."""
        until = monotonic() + seconds
        for cell in wanted:
            found = self._measured(cell, until - monotonic())
            say(found)
            yield found

    def _measured(self, cell: Cell, seconds: float) -> Measured:
        if cell.preset not in PRESETS:
            return Measured(cell.preset, cell.way, "skipped", "no such preset")
        rows = self.rows(cell)
        if self.tiny and (cell.larger or cell.compiled):
            return Measured(cell.preset, cell.way, "skipped", "a rehearsal leaves it out", rows)
        if seconds <= 0:
            return Measured(cell.preset, cell.way, "skipped", "the time was up before it", rows)
        config = self.config(cell)
        vocabulary = prepare(config, self.folder / ".cache").tokenizer.vocab_size
        footprint = footprint_of(config, vocabulary, self.device)
        plan = footprint.at(rows, MICRO_BATCHES).tensors
        try:
            probe = self._probe(config, rows, seconds)
        except OutOfTime:
            return Measured(cell.preset, cell.way, "skipped", "the time was up while it ran", rows)
        except Died as died:
            return Measured(cell.preset, cell.way, "failed", str(died), rows)
        return self._found(cell, config, probe, plan, flops_per_token(config, footprint.structure.values))

    def _probe(self, config: RunConfig, rows: int, seconds: float) -> Probe:
        job = Job(
            config.model_dump(mode="json"),
            str(self.folder / ".cache"),
            rows,
            config.accumulation,
            steps=2 if self.tiny else 10,
            limit_bytes=None if self.device == "cuda" else LIMIT_BYTES,
            threads=torch.get_num_threads(),
            products=True,
        )
        (answer,) = answers("trainers.batch_probe", json.dumps(asdict(job)), seconds)
        return Probe(**json.loads(answer))

    def _found(self, cell: Cell, config: RunConfig, probe: Probe, plan: int, per_token: int) -> Measured:
        fate: Fate = "ok" if probe.fate == "ok" else "out of memory"
        flops = per_token * probe.tokens_per_s if probe.tokens_per_s else None
        return Measured(
            cell.preset,
            cell.way,
            fate,
            without_paths(probe.detail),
            probe.micro,
            config.sequence_length,
            probe.tokens_per_s,
            probe.step_ms,
            probe.peak_bytes,
            plan,
            probe.product_flops,
            flops / probe.product_flops if flops and probe.product_flops else None,
            flops / H100_FLOPS if flops and self._like_an_h100 else None,
        )

    @cached_property
    def _like_an_h100(self) -> bool:
        return self.device == "cuda" and any(card in torch.cuda.get_device_name() for card in ("H100", "H200"))

    # ---- what is run --------------------------------------------------------------------------------------------

    def rows(self, cell: Cell) -> int:
        own = 2 if self.tiny else PRESETS[cell.preset]().micro_sequences
        return own * (TIMES_LARGER if cell.larger else 1)

    def config(self, cell: Cell) -> RunConfig:
        """The preset in bf16 (on a CPU in fp32) over a text of characters, which no package has to cut into tokens."""
        preset = PRESETS[cell.preset]()
        rows = self.rows(cell)
        sequences = rows * (1 if self.tiny else preset.accumulation)
        vocabulary = 256 if self.tiny else preset.model.vocab_size
        compute = "bf16" if self.device == "cuda" else "fp32"  # a CPU without bf16 takes minutes for its products
        settings = [
            *("tokenizer.kind=characters", "tokenizer.vocab_size=null", "data.validation.method=tail"),
            *(f"batch.sequences={sequences}", f"batch.micro_sequences={rows}", "budget.steps=1000000"),
            *(f"precision.compute={compute}", f"compile={str(cell.compiled).lower()}", f"device={self.device}"),
            *(TINY_MODEL if self.tiny else ()),
            f'data.sources=[{{"corpus": "{self._text(vocabulary)}"}}]',
        ]
        return override(preset, settings)

    def _text(self, vocabulary: int | None) -> Path:
        """A text of nearly as many different characters as the table of the model has rows."""
        codes = min(CODES, (vocabulary or PLAIN_CHARACTERS + 8) - 8)
        path = self.folder / f"text-{codes}.txt"
        if not path.exists():
            write_text(path, 20_000 if self.tiny else 1_500_000, codes)
        return path


TINY_MODEL = (
    *("model.d_model=64", "model.n_layers=2", "model.n_heads=4", "model.context_length=32", "model.vocab_size=256"),
    "data.sequence_length=32",
)
