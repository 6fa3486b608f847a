"""Which text row stands where in the batch of step k: arithmetic, without history.

Row i of a text is tokens[i * S : i * S + S + 1], S the sequence length: windows that do not overlap but for the one
token that is the last target of a row and the first input of the next. A row never crosses from one source to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainers.data.mixture import Mixture, quotas
from trainers.data.permutation import permutation
from trainers.errors import DataError

CHUNK = 4096  # samples whose order is computed in one go: NumPy's call overhead would dominate a single small step


@dataclass(frozen=True)
class Share:
    """The rows of each step that one rank reads: a contiguous slice of the step's rows."""

    per_step: int
    """rows of a step over all ranks"""
    first: int
    rows: int

    @property
    def places(self) -> np.ndarray:
        """int64 (rows,): this rank's places in the step, ascending."""
        return np.arange(self.first, self.first + self.rows)


@dataclass(frozen=True)
class Picks:
    """The rows of one source in one step of one rank."""

    source: int
    at: np.ndarray | slice
    """where they go among the rank's rows"""
    rows: np.ndarray
    """int64: row numbers of a packed text; for a stream the count of its rows before this one, ascending"""


class ShuffledOrder:
    """Every row of the joined texts in a new keyed order each epoch.

    The last, partial step of an epoch is dropped: which rows fall into it differs from epoch to epoch.
    """

    def __init__(self, counts: Sequence[int], share: Share, *key: int | str) -> None:
        self.steps_per_epoch: int = sum(counts) // share.per_step
        self._offsets = np.cumsum([0, *counts])
        self._share = share
        self._key = ("epoch", *key)
        self._chunk_steps = max(1, CHUNK // share.rows)
        self._chunk: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty((0, 0), dtype=np.int64))

    def picks(self, step: int) -> list[Picks]:
        """Where the rows of this rank in step `step` come from."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        chunk, row = divmod(inside, self._chunk_steps)
        if self._chunk[0] != (epoch, chunk):
            self._chunk = ((epoch, chunk), self._draw(epoch, chunk * self._chunk_steps))
        return _by_source(self._chunk[1][row], self._offsets)

    def _draw(self, epoch: int, first_step: int) -> np.ndarray:
        """int64 (steps, rows): text rows of the steps from `first_step` on, as many as a chunk and the epoch hold."""
        last_step = min(first_step + self._chunk_steps, self.steps_per_epoch)
        samples = np.arange(first_step, last_step)[:, None] * self._share.per_step + self._share.places
        shuffle = permutation(int(self._offsets[-1]), *self._key, epoch)
        return shuffle(samples.ravel()).reshape(samples.shape)

    def starts(self, step: int) -> None:
        """No row goes on from the step before."""


class StreamsOrder:
    """Row r of the batch reads part r of the text in order, so that step k + 1 goes on where step k ended.

    The joined text is cut into as many equal parts as a step has rows; with weights each source gets whole rows of the
    batch by largest remainder, and its text is cut into that many parts. At the end of a part its row begins there
    anew (`starts` says so); what is left over behind the last part is not read.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float] | None, share: Share) -> None:
        self.steps_per_epoch: int = sum(counts) // share.per_step
        self._offsets = np.cumsum([0, *counts])
        self._first, self._length = _parts(counts, weights, share)

    def picks(self, step: int) -> list[Picks]:
        return _by_source(self._rows(step), self._offsets)

    def starts(self, step: int) -> np.ndarray:
        """bool (rows,): rows that do not go on where the same row of the step before ended."""
        return (step % self._length == 0) | np.isin(self._rows(step), self._offsets)

    def _rows(self, step: int) -> np.ndarray:
        return self._first + step % self._length


class MixtureOrder:
    """Samples drawn by weight; the k-th sample of a source goes through that source's own epochs.

    A source gives all of its rows before it gives one twice. An epoch of the whole is as many steps as the rows of
    all sources together make up.
    """

    def __init__(self, counts: Sequence[int | None], mixture: Mixture, share: Share, *key: int | str) -> None:
        """
        Args:
            counts: rows of each source; None for a stream, which keeps its own order
        """
        known = [count for count in counts if count is not None]
        self.steps_per_epoch: int | None = sum(known) // share.per_step if len(known) == len(counts) else None
        self._counts = counts
        self._mixture = mixture
        self._share = share
        self._key = ("epoch", *key)

    def picks(self, step: int) -> list[Picks]:
        sources, ordinals = self._mixture.locate(step * self._share.per_step + self._share.places)
        picks = []
        for source, count in enumerate(self._counts):
            at = np.flatnonzero(sources == source)
            if at.size:
                rows = ordinals[at] if count is None else self._shuffled(source, count, ordinals[at])
                picks.append(Picks(source, at, rows))
        return picks

    def _shuffled(self, source: int, count: int, ordinals: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(ordinals, count)
        rows = np.empty_like(ordinals)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            rows[here] = permutation(count, *self._key, source, epoch)(places[here])
        return rows

    def starts(self, step: int) -> None:
        """No row goes on from the step before."""


Order = ShuffledOrder | StreamsOrder | MixtureOrder


def _by_source(rows: np.ndarray, offsets: np.ndarray) -> list[Picks]:
    """Rows of the joined texts as rows of each text."""
    if len(offsets) == 2:
        return [Picks(0, slice(None), rows)]
    sources = np.searchsorted(offsets, rows, side="right") - 1
    picks = []
    for source in np.unique(sources):
        at = np.flatnonzero(sources == source)
        picks.append(Picks(int(source), at, rows[at] - offsets[source]))
    return picks


def _parts(counts: Sequence[int], weights: Sequence[float] | None, share: Share) -> tuple[np.ndarray, np.ndarray]:
    """(first row of the joined text, length in rows), int64 (rows,) each: the part that each of a rank's rows reads."""
    texts = [sum(counts)] if weights is None else list(counts)
    batch_rows = (share.per_step,) if weights is None else quotas(weights, share.per_step)
    offset, firsts, lengths = 0, [], []
    for index, (count, parts) in enumerate(zip(texts, batch_rows, strict=True)):
        if parts == 0:
            raise DataError(
                f"with data.order=streams every source needs a whole row of the batch, but source {index} gets none of "
                f"the {share.per_step} (rows by weight: {batch_rows}). Raise batch.sequences or its weight."
            )
        if count < parts:
            raise DataError(
                f"with data.order=streams source {index} is cut into {parts} parts of at least one row, but it has "
                f"only {count} rows. Use a longer text, a smaller batch.sequences or a shorter data.sequence_length."
            )
        firsts.append(offset + np.arange(parts) * (count // parts))
        lengths.append(np.full(parts, count // parts))
        offset += count
    return np.concatenate(firsts)[share.places], np.concatenate(lengths)[share.places]
