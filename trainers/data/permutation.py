"""A shuffled order of n things that nobody has to store.

A generalised Feistel network over Z_a x Z_b with a * b just above n; the few values at or above n walk on along
their cycle until they fall below it, so the whole is a bijection of [0, n) for every key (Black and Rogaway, "Ciphers
with Arbitrary Finite Domains", CT-RSA 2002: the generalised Feistel and the cycle-walking cipher).
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np

ROUNDS = 6  # Luby and Rackoff need 3 to 4; two more for domains of a few dozen rows
_MIX = np.uint64(0xD6E8FEB86659FD93)  # multiplier of Degski's 64-bit mixer
_HALF = np.uint64(32)


class Permutation:
    """The keyed bijection of [0, n): `permutation(indices)` gives where each index goes. O(1) memory."""

    def __init__(self, n: int, *key: int | str) -> None:
        """
        Args:
            n: number of things, 1 to 2**62
            key: what the order depends on, such as (seed, "epoch", phase, epoch)
        """
        assert 1 <= n <= 2**62, n
        self.n = n
        left = math.isqrt(n - 1) + 1
        self._left, self._right = np.uint64(left), np.uint64(-(-n // left))
        self._round_keys = tuple(np.uint64(value) for value in _round_keys(key))
        self._n = np.uint64(n)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """int64 (k,): the images of `indices`, integers (k,) in [0, n)."""
        values = self._network(indices.astype(np.uint64))
        outside = np.flatnonzero(values >= self._n)
        while outside.size:
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self._n]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, self._right)
        for turn in range(0, ROUNDS, 2):
            left = _add_hash(left, right, self._round_keys[turn], self._left)
            right = _add_hash(right, left, self._round_keys[turn + 1], self._right)
        return left * self._right + right


def _add_hash(half: np.ndarray, other: np.ndarray, key: np.uint64, modulus: np.uint64) -> np.ndarray:
    """(half + hash(other, key)) mod modulus; the hash is reduced first, so that the sum cannot overflow."""
    mixed = (other + key) * _MIX
    mixed ^= mixed >> _HALF
    mixed *= _MIX
    mixed ^= mixed >> _HALF
    mixed %= modulus
    mixed += half
    mixed %= modulus
    return mixed


def _round_keys(key: tuple[int | str, ...]) -> list[int]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    return [int.from_bytes(digest[8 * turn : 8 * turn + 8], "little") for turn in range(ROUNDS)]


@lru_cache(maxsize=64)
def permutation(n: int, *key: int | str) -> Permutation:
    """The `Permutation` of this n and key, kept while it is in use: consecutive steps share an epoch."""
    return Permutation(n, *key)
