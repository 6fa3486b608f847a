"""Keys and values of the tokens a model has read, kept between decoding steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KvCache:
    """What attention remembers of each row; rows may have read different numbers of tokens.

    One decoding step is `begin`, one `append` a layer, `commit`.
    """

    def __init__(self, rows: int, n_layers: int, context_length: int, device: torch.device | str = "cpu") -> None:
        self.context_length = context_length
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._keys: list[Tensor | None] = [None] * n_layers
        self._values: list[Tensor | None] = [None] * n_layers

    @property
    def length(self) -> int:
        """Tokens remembered of the longest row."""
        return int(self.lengths.max())

    def drop(self, rows: Sequence[int] | None = None) -> None:
        """Forgets these rows, or all of them."""
        self.lengths[list(rows) if rows is not None else slice(None)] = 0

    def begin(self, width: int, counts: Tensor) -> None:
        """Announces `width` columns, of which row r really holds the first counts[r]; the rest is padding."""
        self.counts = counts
        columns = torch.arange(width, device=counts.device)
        positions = self.lengths[:, None] + columns
        self.reach = int((self.lengths + counts).max())
        if self.reach > self.context_length:
            raise ValueError(
                f"a row of {self.reach} tokens does not fit in context_length ({self.context_length}): "
                "drop the row and decode the last part of its window again."
            )
        self._row, self._column = torch.nonzero(columns < counts[:, None], as_tuple=True)
        self._position = positions[self._row, self._column]
        self.positions = positions.clamp(max=self.context_length - 1)  # of padding columns too: any will do
        """positions of the announced columns, (rows, width)"""
        keys = torch.arange(self.reach, device=counts.device)
        self.mask = keys <= positions[:, None, :, None]
        """True where a column may look at a key, (rows, 1, width, reach)"""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a layer's keys and values (rows, heads, width, head_width); all so far, (rows, heads, reach, ...)."""
        return self._write(self._keys, layer, keys), self._write(self._values, layer, values)

    def commit(self) -> None:
        """Counts the announced tokens as read."""
        self.lengths = self.lengths + self.counts

    def _write(self, store: list[Tensor | None], layer: int, new: Tensor) -> Tensor:
        held = store[layer]
        if held is None:  # only now are dtype and device known: autocast may have changed the first
            rows, heads, _, width = new.shape
            held = store[layer] = new.new_zeros(rows, heads, self.context_length, width)
        held[self._row, :, self._position] = new[self._row, :, self._column]
        return held[:, :, : self.reach]
