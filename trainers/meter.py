"""Meter: how fast a run goes and how much memory it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch

from trainers.memory.resident import forget_resident_peak, release_free_memory, resident_peak

MEMORY_EVERY_S = 1.0  # asking for the memory costs more than all the rest of a reading, and a peak hardly moves
NEVER = float("-inf")


class Meter:
    """Speed since the last reading, without the time spent under `pause`; the peak of memory from here on."""

    def __init__(self, device: torch.device):
        self._memory = PeakMemory(device)
        self._peak: dict[str, float] = {}
        self._peak_read = NEVER
        self.start(0)

    def start(self, tokens: int) -> None:
        """Begin a new interval at `tokens` trained."""
        self._since, self._tokens = time.perf_counter(), tokens

    def read(self, tokens: int) -> dict[str, float]:
        """perf/tokens_per_s since the last reading (all ranks together) and `peak` of this process.

        The peak is looked up at most every MEMORY_EVERY_S, and after each pause.
        """
        now = time.perf_counter()
        seconds, done = now - self._since, tokens - self._tokens
        self._since, self._tokens = now, tokens
        if now - self._peak_read >= MEMORY_EVERY_S:
            self._peak, self._peak_read = self.peak(), now
        return {"perf/tokens_per_s": done / max(seconds, 1e-9), **self._peak}

    def peak(self) -> dict[str, float]:
        """mem/peak_gib as it is now, and on CUDA mem/reserved_gib; empty where it is not this training's alone."""
        return {name: n_bytes / 2**30 for name, n_bytes in self._memory.bytes().items()}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is no training: evaluations. They take memory of their own."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began
        self._peak_read = NEVER


_begun = count()  # trainings of this process


class PeakMemory:
    """The most memory that this training takes: from torch's allocator on CUDA, resident in the process elsewhere.

    A process may train a thousand trials, one after another; what those before took does not count.
    """

    def __init__(self, device: torch.device):
        self._device = device
        first = next(_begun) == 0
        if not first:
            self._release()
        self._known = self._forget() or first

    def bytes(self) -> dict[str, int]:
        """From the beginning until now, as metrics name it: what was allocated, and on CUDA what the allocator held.

        Empty where the system cannot forget what an earlier training took.
        """
        if not self._known:
            return {}
        if self._device.type != "cuda":
            return {"mem/peak_gib": resident_peak()}
        allocated, held = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
        return {"mem/peak_gib": allocated(self._device), "mem/reserved_gib": held(self._device)}

    def _release(self) -> None:
        """Let go of what the allocator keeps of freed memory, for it counts as taken."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            release_free_memory()

    def _forget(self) -> bool:
        """Let the peak begin anew; False where the system has no way to."""
        if self._device.type != "cuda":
            return forget_resident_peak()
        torch.cuda.reset_peak_memory_stats(self._device)
        return True
