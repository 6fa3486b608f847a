"""Meter: how fast a run goes and how much memory it takes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MEMORY_EVERY_S = 1.0  # asking for the memory costs more than all the rest of a reading, and a peak hardly moves


class Meter:
    """Speed since the last reading, without the time spent under `pause`."""

    def __init__(self, device: torch.device):
        self._device = device
        self._peak, self._peak_read = 0.0, -MEMORY_EVERY_S
        self.start(0)

    def start(self, tokens: int) -> None:
        """Begin a new interval at `tokens` trained."""
        self._since, self._tokens = time.perf_counter(), tokens

    def read(self, tokens: int) -> dict[str, float]:
        """perf/tokens_per_s since the last reading (all ranks together) and mem/peak_gib of this process.

        The peak is looked up at most every MEMORY_EVERY_S.
        """
        now = time.perf_counter()
        seconds, done = now - self._since, tokens - self._tokens
        self._since, self._tokens = now, tokens
        if now - self._peak_read >= MEMORY_EVERY_S:
            self._peak, self._peak_read = self._peak_gib(), now
        return {"perf/tokens_per_s": done / max(seconds, 1e-9), "mem/peak_gib": self._peak}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is no training: evaluations."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def _peak_gib(self) -> float:
        """Allocated on the accelerator; resident in the process on the CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        return peak_resident_bytes() / 2**30


def peak_resident_bytes(platform: str = sys.platform) -> int:
    """The most memory that this process has had resident; the kernel counts in KiB, macOS's in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform == "darwin" else peak * 1024
