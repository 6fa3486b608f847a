"""bench: speed and memory of a configuration in every way it could be run, each measured in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.batch_finder import available_rows, run_probe
from orchestrator.memory_limit import Limit
from orchestrator.memory_plan import speed_of
from orchestrator.plan import flops_per_token
from search_spaces.precisions import PRECISIONS, precision_of
from trainers.batch_probe import Job, Probe
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.data.types import PreparedData
from trainers.errors import ConfigError, UserError
from trainers.memory.calibration import Sample

if TYPE_CHECKING:
    from orchestrator.sweeps.memory import Footprints

Choice = Literal["no", "yes", "both"]
SWITCH: dict[str, tuple[bool, ...]] = {"no": (False,), "yes": (True,), "both": (False, True)}


@dataclass(frozen=True)
class BenchQuestion:
    """What is to be measured; None: as configured."""

    batches: tuple[int, ...] = ()
    precisions: tuple[str, ...] | None = None
    compile: Choice | None = None
    recompute: Choice | None = None
    memory_limit: str | None = None
    steps: int = 5

    def check(self) -> None:
        """Raises UserError for what asks for nothing."""
        if self.steps < 1:
            raise UserError(f"--steps {self.steps}: at least 1.")
        if any(rows < 1 for rows in self.batches):
            raise UserError("--batch takes numbers of rows, each at least 1, such as --batch 8,16,32.")
        unknown = [name for name in self.precisions or () if name not in PRECISIONS]
        if unknown:
            raise UserError(f"--precision takes {', '.join(PRECISIONS)}; got {', '.join(unknown)}.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def configs(self, base: RunConfig) -> Iterator[tuple[str, int, RunConfig | str]]:
        """(way, rows, configuration or why there is none) of every cell."""
        names = self.precisions or (precision_of(base),)
        compiled = SWITCH[self.compile] if self.compile else (base.compile,)
        recompute = SWITCH[self.recompute] if self.recompute else (base.model.activation_checkpointing,)
        for name, comp, again in product(names, compiled, recompute):
            way = " ".join([name, *(["recompute"] if again else []), *(["compiled"] if comp else [])])
            words = PRECISIONS[name].sets if name in PRECISIONS and name != precision_of(base) else {}
            for rows in self.batches or (base.micro_sequences,):
                settings = [f"{path}={value}" for path, value in words.items()]
                settings += [f"compile={str(comp).lower()}", f"model.activation_checkpointing={str(again).lower()}"]
                settings += ["workers=1", f"batch.sequences={rows}", "batch.micro_sequences=null"]
                try:
                    yield way, rows, override(base, settings)
                except ConfigError as error:
                    yield way, rows, str(error).splitlines()[0]


@dataclass(frozen=True)
class BenchCell:
    """One combination, as measured."""

    way: str
    """precision, recompute, compiled"""
    rows: int
    probe: Probe
    predicted_bytes: int | None
    """by the plan of what a probe can see: on CUDA without the context, on a CPU above what its process took without a
    model, which is less than a worker's"""
    tensor_bytes: int | None
    """predicted: all but what the device adds"""
    flops_per_token: int
    speed_of: str
    compiled: bool = False

    @property
    def measured_bytes(self) -> int | None:
        """At most: of the process on the CPU, of what the allocator held on CUDA; None: it did not run."""
        if self.probe.fate != "ok":
            return None
        return self.probe.peak_bytes if self.probe.reserved_bytes is None else self.probe.reserved_bytes

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs a second beside those of a matrix product in the same process."""
        if self.probe.tokens_per_s is None or not self.probe.product_flops:
            return None
        return self.probe.tokens_per_s * self.flops_per_token / self.probe.product_flops

    @property
    def headroom_bytes(self) -> int | None:
        """What is left of the limit."""
        if self.probe.limit_bytes is None or self.measured_bytes is None:
            return None
        return self.probe.limit_bytes - self.measured_bytes

    def sample(self) -> Sample | None:
        """What it teaches the calibration; None: it did not run. The compiler takes memory of its own, so a compiled
        cell teaches its speed alone."""
        if self.measured_bytes is None or self.probe.tokens_per_s is None or self.tensor_bytes is None:
            return None
        flops = self.probe.tokens_per_s * self.flops_per_token
        measured = None if self.compiled else self.measured_bytes
        what = f"{self.way}, {self.rows} rows"
        return Sample(what, self.tensor_bytes, measured, flops, self.speed_of, self.probe.process_bytes)

    def to_json(self) -> dict[str, Any]:
        return {
            "way": self.way,
            "rows": self.rows,
            **asdict(self.probe),
            "predicted_bytes": self.predicted_bytes,
            "model_flops_utilisation": self.utilisation,
            "headroom_bytes": self.headroom_bytes,
        }


@dataclass(frozen=True)
class Bench:
    """Every cell of a question."""

    cells: tuple[BenchCell, ...]
    device: str
    limit_bytes: int
    sequence_length: int

    @property
    def ways(self) -> list[str]:
        """In the order of the question."""
        return list(dict.fromkeys(cell.way for cell in self.cells))


def measure_bench(
    config: RunConfig,
    question: BenchQuestion,
    limit: Limit,
    data: PreparedData,
    footprints: Footprints,
    *,
    cache_dir: Path,
    threads: int,
    device: str,
    say: Callable[[str], None],
    trying: Callable[[str], None],
) -> Bench:
    """Measure every cell in a process of its own. Raises DataError for too little text.

    A cell that runs out of memory, or fails, is one of the answers.
    """
    available_rows(config, data)
    cells = []
    for way, rows, cell in question.configs(config):
        trying(f"{way}, {rows} rows")
        found = _cell(way, rows, cell, config, limit, footprints, cache_dir, threads, question.steps)
        cells.append(found)
        say(told(found))
    known = next((cell.probe.limit_bytes for cell in cells if cell.probe.limit_bytes), limit.bytes or 0)
    return Bench(tuple(cells), device, known, config.sequence_length)


def _cell(
    way: str,
    rows: int,
    cell: RunConfig | str,
    base: RunConfig,
    limit: Limit,
    footprints: Footprints,
    cache_dir: Path,
    threads: int,
    steps: int,
) -> BenchCell:
    if isinstance(cell, str):
        return BenchCell(way, rows, Probe(rows, "not tried", cell), None, None, 0, "")
    footprint = footprints.of(cell)
    parts = footprint.at(rows, 2)  # the probe's steps have two micro-batches
    job = Job(cell.model_dump(mode="json"), str(cache_dir), rows, 1, steps, limit.bytes, threads, products=True)
    try:
        probe = run_probe(job)
    except (RuntimeError, UserError) as error:  # what does not work here, for want of a compiler say, is an answer too
        probe = Probe(rows, "not tried", str(error).strip().splitlines()[-1][:200])
    per_token = flops_per_token(cell, footprint.structure.values)
    calibration = footprint.calibration
    seen = parts.total - calibration.process_bytes + calibration.seen_process(probe.process_bytes)
    return BenchCell(way, rows, probe, seen, parts.tensors, per_token, speed_of(cell), cell.compile)


def told(cell: BenchCell) -> str:
    """One line for the terminal."""
    probe = cell.probe
    if probe.tokens_per_s is None:
        return f"{cell.way}, {cell.rows} rows: {probe.fate}" + (f" ({probe.detail})" if probe.detail else "")
    peak = (cell.measured_bytes or 0) / 2**30
    return f"{cell.way}, {cell.rows} rows: {probe.tokens_per_s:,.0f} tokens/s, {probe.step_ms:.4g} ms, {peak:.2f} GiB"
