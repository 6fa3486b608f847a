"""What memory allows in a sweep: which cells of the space can be trained at all, and with which micro-batch.

Decided once in a sweep's life, before its first trial, and kept in sweep.json. Torch is imported only where a guess is
not enough.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.batch_finder import find_batch
from orchestrator.console import size
from orchestrator.memory_limit import Limit
from orchestrator.memory_plan import largest_that_fits, timeline_key
from orchestrator.sweeps.memory_cells import MOST_CELLS, guessed_bytes, listed_cells, memory_cells, with_largest_batch
from search_spaces.domains import Choice, Value, same
from search_spaces.precisions import Device
from search_spaces.space import Axis, Space
from trainers.config import RunConfig
from trainers.data.types import PreparedData
from trainers.errors import UserError
from trainers.memory.calibration import calibration_of
from trainers.memory.fit import worker_rows

if TYPE_CHECKING:
    from trainers.memory.prediction import Footprint, Timelines

AMPLE = 0.5  # of the memory: a guess below this needs no prediction
MARGIN = 0.92  # of the memory that a prediction may fill: it errs by up to 8%


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


def unlooked(asked: int | None) -> str | None:
    """A sentence where nobody knows what memory there will be; `asked`: bytes that a worker may take, as was said."""
    if asked is not None or not os.environ.get("RAY_ADDRESS"):
        return None
    return "memory is not looked at on a cluster unless --memory-limit says what a worker there may take"


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
    largest = with_largest_batch(base, left.space)
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
    largest = with_largest_batch(base, space)  # where one row at a time is taken in the most micro-batches
    known: dict[str, Footprint] = {}
    taken: dict[tuple[str, str], str] = {}
    while True:
        cells = memory_cells(largest, space, footprints.vocab_size)
        known |= {_key(point): footprints.of(config) for point, config in cells.judged if _key(point) not in known}
        peaks = [(point, known[_key(point)].peak_bytes(1)) for point, _ in cells.judged]
        short = [(point, peak) for point, peak in peaks if peak > limit_bytes]
        if not short:
            break
        going = _most_in(space, [point for point, _ in short], [point for point, _ in peaks])
        if going is None:
            raise UserError(
                f"no point of the space fits into memory: even with one row at a time "
                f"{size(min(peak for _, peak in short))} is needed, and {size(limit_bytes)} may be used. Raise "
                "--memory-limit, lower --concurrent, set model.activation_checkpointing=true, or search smaller models."
            )
        path, value = going
        needed = min(peak for point, peak in short if _holds(point, path, value))
        cell = f"{path}={value if isinstance(value, str) else json.dumps(value)}"
        taken[cell, path] = f"one row at a time needs {size(needed)}, and {size(limit_bytes)} may be used"
        space = _without(space, path, value)
    share = worker_rows(largest)
    rows = min((largest_that_fits(known[_key(point)], limit_bytes) for point, _ in cells.judged), default=share)
    gone = tuple((cell, why) for (cell, _), why in taken.items())
    return Allowed(space, gone, None if rows >= share else rows, unjudged=cells.unjudged)


def _key(point: Mapping[str, Value]) -> str:
    return json.dumps(point, sort_keys=True)


def _most_in(space: Space, short: list[dict[str, Value]], cells: list[dict[str, Value]]) -> tuple[str, Value] | None:
    """The option of a choice that the largest share of its cells does not fit with. None: none can go."""
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
    return None if worst is None or not failing(worst)[1] else worst


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
    share = worker_rows(with_largest_batch(base, space))
    guesses = (guessed_bytes(config, vocab_size, share) for _, config in listed_cells(base, space)[0])
    return all(guess < AMPLE * limit_bytes for guess in guesses)
