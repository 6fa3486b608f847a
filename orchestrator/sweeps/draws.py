"""Random numbers that are functions of what they are for, so that a restarted sweep draws what it would have drawn."""

from __future__ import annotations

import hashlib
from random import Random


def seed32(*key: int | str) -> int:
    """A seed below 2**32 (what numpy takes), the same in every process."""
    return int.from_bytes(_digest(key)[:4], "big")


def generator(*key: int | str) -> Random:
    """A generator of its own for `key`, the same in every process."""
    return Random(int.from_bytes(_digest(key), "big"))


def _digest(key: tuple[int | str, ...]) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
