"""What memory allows in a sweep: which cells of the space can be trained at all, and with which micro-batch.

Decided once in a sweep's life and kept in sweep.json. Torch is imported only where a guess is not enough.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.batch_finder import find_batch, model_bytes
from orchestrator.console import size
from orchestrator.memory_limit import Limit
from orchestrator.memory_plan import largest_that_fits, timeline_key
from orchestrator.plan import BYTES_PER_VALUE
from search_spaces.domains import Choice, Float, Int, Value
from search_spaces.precisions import Device
from search_spaces.space import Axis, Space
from search_spaces.trial import trial_config
from trainers.config import RunConfig
from trainers.data.types import PreparedData
from trainers.errors import ConfigError, UserError
from trainers.memory.calibration import Sample, calibration_of, refine
from trainers.memory.fit import worker_rows

if TYPE_CHECKING:
    from trainers.memory.prediction import Footprint, Timelines

AMPLE = 0.5  # of the memory: a guess below this needs no prediction
MARGIN = 0.92  # of the memory that a prediction may fill: it errs by up to 8%
VALUES_A_TOKEN = 40  # of d_model that a layer keeps for the backward pass, generously
PROCESS_BYTES = 600 << 20  # Python, torch and their libraries
MOST_CELLS = 256
CHANGES_MEMORY = re.compile(
    r"(phases\.[^.]+\.)?(precision|model|batch|optim\.(name|momentum)|engine|deepspeed|parallel|compile)(\..+)?"
    r"|data\.sequence_length"
)


@dataclass(frozen=True)
class Allowed:
    """What is left of a space, and why the rest is not."""

    space: Space
    taken_out: tuple[tuple[str, str], ...] = ()
    """(cell, reason)"""
    micro_limit: int | None = None
    """rows of a micro-batch that fit in every cell that is left; None: any batch does"""

    def to_json(self) -> dict[str, Any]:
        return {
            "space": self.space.to_json(),
            "taken_out": [list(each) for each in self.taken_out],
            "micro_limit": self.micro_limit,
        }

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Allowed:
        return Allowed(
            Space.from_json(stored["space"]),
            tuple((cell, reason) for cell, reason in stored["taken_out"]),
            stored["micro_limit"],
        )


class Footprints:
    """Predicted footprints of a sweep's configurations, each cell of memory once; safe to share among threads."""

    def __init__(self, vocab_size: int, device: Device, calibrations: Path):
        self._vocab_size, self._device, self._calibrations = vocab_size, device, calibrations
        self._highest = 0
        self._calibration = calibration_of(device, calibrations)
        self._timelines: dict[tuple[Any, ...], Timelines] = {}
        self._lock = threading.Lock()

    def of(self, config: RunConfig) -> Footprint:
        """The memory of one worker of `config`."""
        from trainers.memory.prediction import read_footprint, timeline_of

        key = timeline_key(config)
        with self._lock:
            if key not in self._timelines:
                self._timelines[key] = timeline_of(config, self._vocab_size, self._device)
            timeline = self._timelines[key]
        return read_footprint(config, self._vocab_size, self._device, self._calibration, timeline=timeline)

    def peak_bytes(self, config: RunConfig) -> int:
        """What one worker of `config` takes at most."""
        return self.of(config).peak_bytes(config.micro_sequences, config.accumulation)

    def learn(self, config: RunConfig, measured_bytes: int) -> None:
        """Sharpen the calibration for the plans to come; this sweep keeps the one it began with.

        The processes of a sweep train one trial after another and tell their highest memory ever, so only a trial that
        goes beyond all before it has been measured.
        """
        with self._lock:
            if measured_bytes <= self._highest:
                return
            self._highest = measured_bytes
        tensors = self.of(config).at(config.micro_sequences, config.accumulation).tensors
        what = f"{config.preset} {config.micro_sequences} rows"
        refine(self._calibration.device, self._calibrations, [Sample(what, tensors, measured_bytes)])


def allowed(
    base: RunConfig,
    space: Space,
    data: PreparedData,
    limit: Limit,
    footprints: Footprints,
    *,
    device: Device,
    threads: int,
    cache_dir: Path,
    say: Callable[[str], None],
) -> Allowed:
    """The part of `space` whose every point can be trained within `limit`, which is one worker's.

    Predicted on a CPU. On a GPU cells are taken out by prediction too, and the micro-batch is measured in processes of
    their own (`find_batch`). Raises UserError where nothing is left.
    """
    largest = _with_largest_batch(base, space)
    share = worker_rows(largest)
    left = Allowed(space)
    if limit.bytes is not None:
        if is_ample(base, space, data.tokenizer.vocab_size, limit.bytes):
            return left
        say(f"predicting which cells fit into {size(limit.bytes)} ({limit.source})")
        left = take_out(base, space, round(MARGIN * limit.bytes), footprints)
        for cell, reason in left.taken_out:
            say(f"left out: {cell}: {reason}")
    if device != "cuda":
        return left
    say("looking for the micro-batch that fits")
    found = find_batch(
        largest, limit, cache_dir=cache_dir, threads=threads, most=share, steps=1, device=device, say=say, data=data
    )
    measured = None if found.largest.micro >= share else found.largest.micro
    return replace(left, micro_limit=_smaller(left.micro_limit, measured))


def take_out(base: RunConfig, space: Space, limit_bytes: int, footprints: Footprints) -> Allowed:
    """`space` without the options under which not even one row fits into `limit_bytes`. Raises UserError.

    Where only some combinations of options do not fit, the option that is in most of them goes, until none is left.
    """
    largest = _with_largest_batch(base, space)  # where one row at a time is taken in the most micro-batches
    cells = [(point, footprints.of(config)) for point, config in memory_cells(largest, space)]
    short = [(point, footprint.peak_bytes(1)) for point, footprint in cells if footprint.peak_bytes(1) > limit_bytes]
    taken: dict[tuple[str, str], str] = {}
    while short:
        path, value = _most_in(space, [point for point, _ in short], [point for point, _ in cells])
        needed = min(peak for point, peak in short if _holds(point, path, value))
        cell = f"{path}={value if isinstance(value, str) else json.dumps(value)}"
        taken[cell, path] = f"one row at a time needs {size(needed)}, and {size(limit_bytes)} may be used"
        space = _without(space, path, value)
        cells = [(point, footprint) for point, footprint in cells if not _holds(point, path, value)]
        short = [(point, peak) for point, peak in short if not _holds(point, path, value)]
    share = worker_rows(largest)
    rows = min((largest_that_fits(footprint, limit_bytes) for _, footprint in cells), default=share)
    return Allowed(space, tuple((cell, why) for (cell, _), why in taken.items()), None if rows >= share else rows)


def memory_cells(base: RunConfig, space: Space) -> Iterator[tuple[dict[str, Value], RunConfig]]:
    """Every combination of what changes memory, with both ends of continuous axes: the part of a point, and its run."""
    axes = tuple(axis for axis in space.axes if CHANGES_MEMORY.fullmatch(axis.path) and not _is_batch(axis))
    for point in islice(Space(axes).grid(2), MOST_CELLS):
        try:
            yield point, trial_config(point, base)
        except ConfigError:  # no run: the sweep finds that out by itself
            continue


def _is_batch(axis: Axis) -> bool:
    return axis.path.startswith("batch.")  # taken in as many micro-batches as it needs


def _most_in(space: Space, short: list[dict[str, Value]], cells: list[dict[str, Value]]) -> tuple[str, Value]:
    """The option of a choice that the largest share of its cells does not fit with. UserError where none can go."""
    options = [
        (axis.path, value)
        for axis in space.axes
        if isinstance(axis.domain, Choice) and len(axis.domain.values) > 1
        for value in axis.domain.values
    ]

    def failing(option: tuple[str, Value]) -> tuple[float, int]:
        bad, all_of_it = (sum(_holds(point, *option) for point in points) for points in (short, cells))
        return bad / max(1, all_of_it), bad

    worst = max(options, key=failing, default=None)
    if worst is None or not failing(worst)[1]:
        raise UserError(
            "no point of the space fits into memory, not even with one row at a time. Raise --memory-limit, lower "
            "--concurrent, set model.activation_checkpointing=true, or search smaller models."
        )
    return worst


def _holds(point: Mapping[str, Value], path: str, value: Value) -> bool:
    return path in point and json.dumps(point[path]) == json.dumps(value)


def _without(space: Space, path: str, value: Value) -> Space:
    axis = space.axis(path)
    assert isinstance(axis.domain, Choice)
    kept = tuple(each for each in axis.domain.values if json.dumps(each) != json.dumps(value))
    return space.with_axis(Axis(path, Choice(kept), axis.when))


def _smaller(one: int | None, other: int | None) -> int | None:
    return min((each for each in (one, other) if each is not None), default=None)


# ---- a guess that is surely enough -----------------------------------------------------------------------------


def is_ample(base: RunConfig, space: Space, vocab_size: int, limit_bytes: int) -> bool:
    """Whether every cell surely fits, with all rows of a step at a time."""
    share = worker_rows(_with_largest_batch(base, space))
    guesses = (guessed_bytes(config, vocab_size, share) for _, config in memory_cells(base, space))
    return all(guess < AMPLE * limit_bytes for guess in guesses)


def _with_largest_batch(base: RunConfig, space: Space) -> RunConfig:
    domain = space.get("batch.sequences")
    if domain is None:
        return base
    most = max(domain.values) if isinstance(domain, Choice) else domain.high
    return trial_config({"batch.sequences": int(most)}, base) if isinstance(domain, Choice | Int | Float) else base


def guessed_bytes(config: RunConfig, vocab_size: int, rows: int) -> int:
    """Memory of one worker's process with so many rows in a micro-batch: what is surely enough."""
    tokens, model = rows * config.sequence_length, config.model
    attention = rows * model.n_heads * config.sequence_length**2 * model.n_layers
    table = config.model.vocab_size or vocab_size
    activations = tokens * model.d_model * model.n_layers * VALUES_A_TOKEN + attention + 4 * tokens * table
    snapshot = math.ceil(0.75 * model_bytes(config, vocab_size))
    return PROCESS_BYTES + model_bytes(config, vocab_size) + snapshot + activations * BYTES_PER_VALUE
