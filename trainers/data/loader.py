"""The batches of one phase for one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from trainers.config import Phase, RunConfig
from trainers.data.mixture import Mixture
from trainers.data.order import MixtureOrder, Order, Share, ShuffledOrder, StreamsOrder
from trainers.data.stream import StreamedSource, StreamReader
from trainers.data.types import Batch, PhaseData
from trainers.errors import ConfigError, DataError


def build_loader(config: RunConfig, phase: Phase, data: PhaseData, rank: int, world_size: int) -> RowLoader:
    """The loader of `phase` for `rank` of `world_size`.

    The rows of a step and their order do not depend on the number of ranks or micro-batches: rank r reads the r-th
    contiguous slice of the step's rows, and micro-batch m is the m-th slice of that.

    Raises:
        DataError: too little text for one step, or an order that this data cannot have.
        ConfigError: a batch that does not divide among this many ranks.
    """
    share, micro_rows = _share(config, rank, world_size)
    length = config.sequence_length
    sources: list[TextRows] = [
        source.open(length, config.seed, phase.index, index)
        if isinstance(source, StreamedSource)
        else PackedRows(source.tokens, length)
        for index, source in enumerate(data.sources)
    ]
    order = _order(config, phase, data, [source.count for source in sources], share)
    pin = config.device in ("auto", "cuda") and torch.cuda.is_available()
    return RowLoader(order, sources, share.rows, micro_rows, length, pin=pin)


class PackedRows:
    """The rows of a packed text: `count` = floor((N - 1) / S)."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        """
        Args:
            tokens: unsigned (N,), may be memory-mapped
            length: S, tokens in one row without the last target
        """
        plain = np.asarray(tokens)  # a memmap pays for its subclass at every access
        self.count = max(0, (len(plain) - 1) // length)
        stride = plain.strides[0]
        self._rows = as_strided(plain, (self.count, length + 1), (length * stride, stride), writeable=False)

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        """Unsigned (k, S + 1): the tokens of the rows with these numbers, int64 (k,)."""
        return self._rows[rows]


TextRows = PackedRows | StreamReader


class RowLoader:
    """`types.Loader`: asks the order where each row comes from, and the texts for the rows."""

    def __init__(
        self, order: Order, sources: Sequence[TextRows], rows: int, micro_rows: int, length: int, *, pin: bool
    ) -> None:
        self.steps_per_epoch: int | None = order.steps_per_epoch
        self._order, self._sources = order, sources
        self._shape = (rows, length)
        self._micro_rows = micro_rows
        self._pin = pin
        self._streams = {str(index): source for index, source in enumerate(sources) if isinstance(source, StreamReader)}

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of step `step`, counted from 0 inside the phase.

        With a streaming corpus the steps must be asked for in ascending order; a step further on is read up to.
        """
        inputs, targets = np.empty(self._shape, np.int64), np.empty(self._shape, np.int64)
        for picks in self._order.picks(step):
            block = self._sources[picks.source].fetch(picks.rows)
            inputs[picks.at], targets[picks.at] = block[:, :-1], block[:, 1:]
        starts = self._order.starts(step)
        return self._split(inputs, targets, starts)

    def _split(self, inputs: np.ndarray, targets: np.ndarray, starts: np.ndarray | None) -> list[Batch]:
        tokens, scored = self._tensor(inputs), self._tensor(targets)
        fresh = None if starts is None else self._tensor(starts)
        batches = []
        for first in range(0, self._shape[0], self._micro_rows):
            rows = slice(first, first + self._micro_rows)
            batches.append(
                Batch(
                    tokens=tokens[rows],
                    targets=scored[rows],
                    n_targets=self._micro_rows * self._shape[1],  # a row of a packed text has no padding
                    starts=None if fresh is None else fresh[rows],
                )
            )
        return batches

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pin else tensor

    def state(self) -> dict[str, Any]:
        """JSON of constant size: where each streaming source stands. Empty for packed data: a step is arithmetic.

        The states of all ranks at one step are interchangeable, whatever their number.
        """
        return {index: reader.state() for index, reader in self._streams.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`.

        Raises:
            DataError: the state is of other sources, or of another commit of one.
        """
        if state.keys() != self._streams.keys():
            raise DataError(
                f"the checkpoint holds the positions of the streaming sources {sorted(state)}, "
                f"but this phase streams {sorted(self._streams)}. Continue with the data the run began with."
            )
        for index, reader in self._streams.items():
            reader.restore(state[index])

    def close(self) -> None:
        """Ends the background threads."""
        for reader in self._streams.values():
            reader.close()


def _share(config: RunConfig, rank: int, world_size: int) -> tuple[Share, int]:
    """The rank's rows of a step, and the rows of one micro-batch."""
    assert 0 <= rank < world_size, (rank, world_size)
    per_step = config.sequences_per_step
    unit = (config.batch.micro_sequences or 1) * world_size
    if per_step % unit:
        raise ConfigError(
            f"the batch of {per_step} sequences must be a multiple of micro_sequences x ranks "
            f"({config.batch.micro_sequences or 1} x {world_size} = {unit}). "
            f"Nearest: {max(1, per_step // unit) * unit}."
        )
    rows = per_step // world_size
    return Share(per_step, rank * rows, rows), config.batch.micro_sequences or rows


def _order(config: RunConfig, phase: Phase, data: PhaseData, counts: list[int | None], share: Share) -> Order:
    names = ", ".join(source.corpus for source in phase.data.sources)
    known = [count for count in counts if count is not None]
    if len(known) == len(counts):
        _enough_rows(known, names, share, config.sequence_length)
    elif phase.data.order == "streams":
        raise DataError(
            f"data.order=streams cuts a text of known length into parts, but {names} is streaming. "
            "Set data.order=shuffled, or streaming=false on every source."
        )
    elif len(counts) > 1 and data.weights is None:
        raise DataError(
            f"a streaming corpus has no end at which another could follow: give every source of {names} a weight."
        )
    if phase.data.order == "streams":
        return StreamsOrder(known, data.weights, share)
    if len(known) == len(counts) and data.weights is None:
        return ShuffledOrder(known, share, config.seed, phase.index)
    mixture = Mixture(data.weights or (1.0,), config.seed, phase.index)
    return MixtureOrder(counts, mixture, share, config.seed, phase.index)


def _enough_rows(counts: list[int], names: str, share: Share, length: int) -> None:
    if 0 in counts:
        raise DataError(
            f"every source needs at least one row of data.sequence_length + 1 = {length + 1} tokens; "
            f"rows of {names}: {', '.join(map(str, counts))}. Use longer texts or a shorter data.sequence_length."
        )
    if sum(counts) < share.per_step:
        raise DataError(
            f"one step takes {share.per_step} rows of {length} tokens, but {names} gives only {sum(counts)}. "
            f"Use a longer text, batch.sequences of at most {sum(counts)}, or a shorter data.sequence_length."
        )
