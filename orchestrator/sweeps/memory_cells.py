"""Cells: the combinations of a space that differ in memory, the largest first by a guess. Imports no torch."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from orchestrator.batch_finder import model_bytes
from orchestrator.plan import BYTES_PER_VALUE
from search_spaces.domains import Choice, Float, Int, Value, same
from search_spaces.space import Axis, Space
from search_spaces.trial import trial_config
from trainers.config import RunConfig
from trainers.errors import ConfigError

VALUES_A_TOKEN = 40  # of d_model that a layer keeps for the backward pass, generously
PROCESS_BYTES = 600 << 20  # Python, torch and their libraries
MOST_CELLS = 256  # that are predicted ...
MOST_LISTED = 2048  # ... of those that are looked at
CHANGES_MEMORY = re.compile(
    r"(phases\.[^.]+\.)?(precision|model|batch|optim\.(name|momentum)|engine|deepspeed|parallel|compile)(\..+)?"
    r"|data\.sequence_length"
)


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
    listed, others = listed_cells(base, space)
    listed.sort(key=lambda cell: -guessed_bytes(cell[1], vocab_size, 1))
    return Cells(listed[:MOST_CELLS], max(0, len(listed) - MOST_CELLS) + others)


def listed_cells(base: RunConfig, space: Space) -> tuple[list[tuple[dict[str, Value], RunConfig]], int]:
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


def _is_batch(axis: Axis) -> bool:
    return axis.path.startswith("batch.")  # taken in as many micro-batches as it needs


def with_largest_batch(base: RunConfig, space: Space) -> RunConfig:
    """`base` with the most rows of a step that the space has."""
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
