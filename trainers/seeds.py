"""Random streams split per purpose, so that one purpose never disturbs another and any draw can be redone."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch

_MASK = (1 << 64) - 1
_PURPOSES = {"model": 1, "data": 2, "dropout": 3, "sampling": 4, "python": 5, "rounding": 6}


def stream_seed(seed: int, purpose: str, *position: int) -> int:
    """The seed of one draw: a 63-bit hash of (seed, purpose, position...) by SplitMix64 (Steele et al., 2014)."""
    state = _mix(seed + 0x9E3779B97F4A7C15 * _PURPOSES[purpose])
    for part in position:
        state = _mix(state ^ (part + 0x9E3779B97F4A7C15))
    return state >> 1


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def seed_everything(seed: int, rank: int) -> None:
    """Start the global generators of this rank. The loop itself draws only from its own streams."""
    random.seed(stream_seed(seed, "python", rank))
    np.random.seed(stream_seed(seed, "python", rank, 1) & 0xFFFFFFFF)
    torch.manual_seed(stream_seed(seed, "python", rank, 2))


def rng_tensors() -> dict[str, torch.Tensor]:
    """The state of every global generator of this process as tensors, for a checkpoint."""
    version, words, gauss = random.getstate()
    assert version == 3
    kind, keys, position, has_gauss, cached = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    assert kind == "MT19937"
    numbers = np.empty(len(keys) + 2, dtype=np.int64)
    numbers[:-2], numbers[-2], numbers[-1] = keys, position, has_gauss
    tensors = {
        "rng/python": torch.from_numpy(np.array(words, dtype=np.int64)),
        "rng/python_gauss": torch.from_numpy(np.array([] if gauss is None else [gauss], dtype=np.float64)),
        "rng/numpy": torch.from_numpy(numbers),
        "rng/numpy_gauss": torch.from_numpy(np.array([cached], dtype=np.float64)),
        "rng/torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(tensors: dict[str, torch.Tensor]) -> None:
    """Put every global generator back where `rng_tensors` found it."""
    gauss = tensors["rng/python_gauss"].tolist()
    random.setstate((3, tuple(tensors["rng/python"].tolist()), gauss[0] if gauss else None))
    numbers: list[Any] = tensors["rng/numpy"].tolist()
    keys = np.array(numbers[:-2], dtype=np.uint32)
    np.random.set_state(("MT19937", keys, numbers[-2], numbers[-1], tensors["rng/numpy_gauss"].item()))
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
