"""Which source each sample of a weighted mixture comes from, as arithmetic on the sample's number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainers.data.permutation import permutation
from trainers.errors import DataError

BLOCK = 1000  # samples over which the shares are met exactly


class Mixture:
    """Shares of the sources, met exactly in every block of 1000 samples, in a keyed order inside the block."""

    def __init__(self, weights: Sequence[float], *key: int | str) -> None:
        """
        Args:
            weights: one a source, positive, in any unit
            key: what the order depends on, such as (seed, phase)
        Raises:
            DataError: a share too small to fall into a block of 1000 samples.
        """
        self.quotas = quotas(weights, BLOCK)
        if 0 in self.quotas:
            shares = ", ".join(f"{weight / sum(weights):.4f}" for weight in weights)
            raise DataError(
                f"every source of a mixture needs a share of at least about 1/{BLOCK}; got shares {shares}. "
                "Raise the smallest weight, or leave that source out."
            )
        self._key = ("mixture", *key)
        self._slots = np.repeat(np.arange(len(self.quotas)), self.quotas)  # (BLOCK,) source of each slot
        self._drawn: tuple[int, np.ndarray, np.ndarray] = (-1, self._slots, self._slots)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, ordinal), int64 (k,) each: sample n is the `ordinal`-th sample, from 0, that `source` gives.

        Args:
            samples: int64 (k,), ascending, of any size
        """
        source, ordinal = np.empty_like(samples), np.empty_like(samples)
        blocks, places = np.divmod(samples, BLOCK)
        for block in range(int(blocks[0]), int(blocks[-1]) + 1):
            here = slice(*np.searchsorted(blocks, (block, block + 1)))
            sources, ranks = self._block(block)
            source[here] = sources[places[here]]
            ordinal[here] = ranks[places[here]] + block * np.asarray(self.quotas)[source[here]]
        return source, ordinal

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, rank among the samples of that source), int64 (BLOCK,) each, of one block."""
        if self._drawn[0] != block:
            sources = self._slots[permutation(BLOCK, *self._key, block)(np.arange(BLOCK))]
            ranks = np.empty(BLOCK, dtype=np.int64)
            for index, quota in enumerate(self.quotas):
                ranks[sources == index] = np.arange(quota)
            self._drawn = (block, sources, ranks)
        return self._drawn[1], self._drawn[2]


def quotas(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """`total` shared out by weight with the largest-remainder method; sums to `total`. Ties go to the first."""
    exact = [weight / sum(weights) * total for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return tuple(shares)
