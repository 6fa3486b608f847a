"""What memory allows in a sweep: which cells of the space can be trained at all, and with which micro-batch.

Decided once in a sweep's life, before its first trial, and kept in sweep.json. Torch is imported only where a guess is
not enough.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.batch_finder import find_batch, model_bytes
from orchestrator.console import size
from orchestrator.memory_limit import Limit
from orchestrator.memory_plan import largest_that_fits, timeline_key
from orchestrator.plan import BYTES_PER_VALUE
from search_spaces.domains import Choice, Float, Int, Value, same
from search_spaces.precisions import Device
from search_spaces.space import Axis, Space
from search_spaces.trial import trial_config
from trainers.config import RunConfig
from trainers.data.types import PreparedData
from trainers.errors import ConfigError, UserError
from trainers.memory.calibration import calibration_of
from trainers.memory.fit import worker_rows

if TYPE_CHECKING:
    from trainers.memory.prediction import Footprint, Timelines

AMPLE = 0.5  # of the memory: a guess below this needs no prediction
MARGIN = 0.92  # of the memory that a prediction may fill: it errs by up to 8%
VALUES_A_TOKEN = 40  # of d_model that a layer keeps for the backward pass, generously
PROCESS_BYTES = 600 << 20  # Python, torch and their libraries
MOST_CELLS = 256  # that are predicted ...
MOST_LISTED = 2048  # ... of those that are looked at
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
    limit_bytes: int | None = None
    """what each worker is held to because it has only a part of a GPU; None: nobody shares one"""
    unjudged: int = 0
    """smaller combinations that were not predicted one by one"""

    def to_json(self) -> dict[str, Any]:
        return {
            "space": self.space.to_json(),
            "taken_out": [list(each) for each in self.taken_out],
            "micro_limit": self.micro_limit,
            "limit_bytes": self.limit_bytes,
            "unjudged": self.unjudged,
        }

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Allowed:
        return Allowed(
            Space.from_json(stored["space"]),
            tuple((cell, reason) for cell, reason in stored["taken_out"]),
            stored["micro_limit"],
            stored.get("limit_bytes"),
            stored.get("unjudged", 0),
        )


class Footprints:
    """Predicted footprints of a sweep's configurations, each cell of memory once; safe to share among threads."""

    def __init__(self, vocab_size: int, device: Device, calibrations: Path):
        self.vocab_size, self._device = vocab_size, device
        self._calibration = calibration_of(device, calibrations)
        self._timelines: dict[tuple[Any, ...], Timelines] = {}
        self._lock = threading.Lock()

    def of(self, config: RunConfig) -> Footprint:
        """The memory of one worker of `config`."""
        from trainers.memory.prediction import read_footprint, timeline_of

        key = timeline_key(config)
        with self._lock:
            if key not in self._timelines:
                self._timelines[key] = timeline_of(config, self.vocab_size, self._device)
            timeline = self._timelines[key]
        return read_footprint(config, self.vocab_size, self._device, self._calibration, timeline=timeline)

    def peak_bytes(self, config: RunConfig) -> int:
        """What one worker of `config` takes at most."""
        return self.of(config).peak_bytes(config.micro_sequences, config.accumulation)


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
    is_here: bool = True,
) -> Allowed:
    """The part of `space` whose every point can be trained within `limit`, which is one worker's.

    Cells are taken out by prediction, which needs no device. On a GPU, if it `is_here`, the micro-batch is measured
    too, in processes of their own (`find_batch`). Raises UserError where nothing is left.
    """
    assert limit.bytes is not None
    if is_ample(base, space, footprints.vocab_size, limit.bytes):
        return Allowed(space)
    say(f"predicting which cells fit into {size(limit.bytes)} ({limit.source})")
    left = take_out(base, space, round(MARGIN * limit.bytes), footprints)
    for cell, reason in left.taken_out:
        say(f"left out: {cell}: {reason}")
    if left.unjudged:
        say(f"{left.unjudged} smaller combinations are taken to fit, for the {MOST_CELLS} largest of them do")
    if device != "cuda" or not is_here:
        return left
    say("looking for the micro-batch that fits")
    largest = _with_largest_batch(base, left.space)
    share = worker_rows(largest)
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
    known: dict[str, Footprint] = {}
    taken: dict[tuple[str, str], str] = {}
    while True:
        cells = memory_cells(largest, space, footprints.vocab_size)
        for point, config in cells.judged:
            known.setdefault(_key(point), footprints.of(config))
        peaks = [(point, known[_key(point)].peak_bytes(1)) for point, _ in cells.judged]
        short = [(point, peak) for point, peak in peaks if peak > limit_bytes]
        if not short:
            break
        path, value = _most_in(space, [point for point, _ in short], [point for point, _ in peaks])
        needed = min(peak for point, peak in short if _holds(point, path, value))
        cell = f"{path}={value if isinstance(value, str) else json.dumps(value)}"
        taken[cell, path] = f"one row at a time needs {size(needed)}, and {size(limit_bytes)} may be used"
        space = _without(space, path, value)
    share = worker_rows(largest)
    rows = min((largest_that_fits(known[_key(point)], limit_bytes) for point, _ in cells.judged), default=share)
    gone = tuple((cell, why) for (cell, _), why in taken.items())
    return Allowed(space, gone, None if rows >= share else rows, unjudged=cells.unjudged)


# ---- the cells of memory -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """Combinations of what changes memory."""

    judged: list[tuple[dict[str, Value], RunConfig]]
    """part of a point, and its run; those that a guess says are the largest, in falling order"""
    unjudged: int
    """further ones"""


def memory_cells(base: RunConfig, space: Space, vocab_size: int) -> Cells:
    """Every combination of what changes memory, with both ends of continuous axes; the MOST_CELLS largest are judged.

    What governs whether an axis exists belongs to it.
    """
    listed, others = _listed(base, space)
    listed.sort(key=lambda cell: -guessed_bytes(cell[1], vocab_size, 1))
    return Cells(listed[:MOST_CELLS], max(0, len(listed) - MOST_CELLS) + others)


def _listed(base: RunConfig, space: Space) -> tuple[list[tuple[dict[str, Value], RunConfig]], int]:
    """Cells with their runs, of too many those at the ends of every axis; the number that is not among them, at most.

    What makes no run is left out: the sweep finds that out by itself.
    """
    axes = _of_memory(space)
    whole = Space(tuple(Axis(axis.path, Choice(_options(axis, axes)), axis.when) for axis in axes))
    counted = math.prod(len(domain.grid(1)) for domain in whole.values())
    if counted > MOST_LISTED:
        whole = Space(tuple(Axis(axis.path, Choice(_ends(axis, axes)), axis.when) for axis in whole.axes))
    points = list(islice(whole.grid(1), MOST_LISTED))
    found = []
    for point in points:
        with contextlib.suppress(ConfigError):
            found.append((point, trial_config(point, base)))
    return found, counted - len(points) if counted > MOST_LISTED else 0


def _of_memory(space: Space) -> tuple[Axis, ...]:
    wanted = {axis.path for axis in space.axes if CHANGES_MEMORY.fullmatch(axis.path) and not _is_batch(axis)}
    for axis in reversed(space.axes):
        if axis.path in wanted and axis.when is not None:
            wanted.add(axis.when.path)
    return tuple(axis for axis in space.axes if axis.path in wanted)


def _options(axis: Axis, axes: Iterable[Axis]) -> tuple[Value, ...]:
    """Those of a choice, the ends of a range, and what other axes wait for; numbers in falling order."""
    awaited = [value for other in axes if other.when and other.when.path == axis.path for value in other.when.values]
    values = list(axis.domain.grid(2))
    values += [value for value in awaited if not any(same(value, other) for other in values)]
    return tuple(sorted(values, reverse=True)) if all(map(_is_number, values)) else tuple(values)


def _ends(axis: Axis, axes: Iterable[Axis]) -> tuple[Value, ...]:
    """Of numbers only the largest and the smallest, and what other axes wait for: what is between takes no more."""
    values = _options(axis, axes)
    if not all(map(_is_number, values)):
        return values
    awaited = [value for other in axes if other.when and other.when.path == axis.path for value in other.when.values]
    return tuple(value for value in values if value in (values[0], values[-1], *awaited))


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _key(point: Mapping[str, Value]) -> str:
    return json.dumps(point, sort_keys=True)


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
    return path in point and same(point[path], value)


def _without(space: Space, path: str, value: Value) -> Space:
    axis = space.axis(path)
    assert isinstance(axis.domain, Choice)
    kept = tuple(each for each in axis.domain.values if not same(each, value))
    return space.with_axis(Axis(path, Choice(kept), axis.when))


def _smaller(one: int | None, other: int | None) -> int | None:
    return min((each for each in (one, other) if each is not None), default=None)


# ---- a guess that is surely enough -----------------------------------------------------------------------------


def is_ample(base: RunConfig, space: Space, vocab_size: int, limit_bytes: int) -> bool:
    """Whether every cell surely fits, with all rows of a step at a time."""
    share = worker_rows(_with_largest_batch(base, space))
    guesses = (guessed_bytes(config, vocab_size, share) for _, config in _listed(base, space)[0])
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
