"""SnapshotBuffer: a private copy of live tensors at the price of one memory copy."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

ALIGNMENT = 64  # bytes: a cache line, and more than any element needs
# Bytes below which one thread copies a tensor. torch's copy wakes the thread pool for each tensor and waits for all of
# it; where another process holds a core, that wait is a time slice: 180 tensors took 1.4 s instead of 40 ms.
ONE_THREAD = 64 << 20


class SnapshotBuffer(Generic[Key]):
    """CPU memory that is laid out once and copied into again and again.

    Fresh memory costs a page fault for every 4 KiB, which is several times the copy itself; so the arena is allocated
    and touched ahead (`reserve`) and reused as long as names, shapes and dtypes stay the same. It is pinned where a
    tensor lives on a GPU. The copies of one snapshot are overwritten by the next.
    """

    def __init__(self) -> None:
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._layout: list[tuple[Key, torch.Size, torch.dtype]] = []
        self._views: dict[Key, torch.Tensor] = {}

    @property
    def size_bytes(self) -> int:
        """Memory held."""
        return self._arena.numel()

    def reserve(self, tensors: Mapping[Key, torch.Tensor]) -> None:
        """Lay out and touch the memory for tensors of these shapes and dtypes (`meta` tensors will do)."""
        layout = [(key, tensor.shape, tensor.dtype) for key, tensor in tensors.items()]
        pinned = any(tensor.device.type == "cuda" for tensor in tensors.values())
        must_pin = pinned and not self._arena.is_pinned()
        if layout == self._layout and not must_pin:
            return
        offsets, total = _offsets(list(tensors.values()))
        if total > self._arena.numel() or must_pin:
            self._views = {}
            self._arena = torch.empty(0, dtype=torch.uint8)  # let go of the old memory before asking for new
            self._arena = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
            self._arena.zero_()
        self._views = {
            key: self._arena[offset : offset + _size(tensor)].view(tensor.dtype).view(tensor.shape)
            for (key, tensor), offset in zip(tensors.items(), offsets, strict=True)
        }
        self._layout = layout

    def copy(self, tensors: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
        """CPU copies of `tensors` as they are at this moment, complete when this returns."""
        self.reserve(tensors)
        with torch.no_grad():
            for key, tensor in tensors.items():
                _copy(self._views[key], tensor)
        for device in {tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"}:
            torch.accelerator.synchronize(device)
        return dict(self._views)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    plain = source.device.type == "cpu" and source.is_contiguous() and not source.is_complex()
    if plain and _size(source) < ONE_THREAD:
        ctypes.memmove(target.data_ptr(), source.data_ptr(), _size(source))
    else:
        target.copy_(source, non_blocking=True)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _offsets(tensors: list[torch.Tensor]) -> tuple[list[int], int]:
    """Where each tensor starts, and how many bytes that is in all."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-_size(tensor) // ALIGNMENT) * ALIGNMENT
    return offsets, end
