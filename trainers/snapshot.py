"""SnapshotBuffer: a private copy of live tensors at the price of one memory copy."""

from __future__ import annotations

import ctypes
import mmap
from collections import deque
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

ALIGNMENT = 64  # bytes: a cache line, and more than any element needs
PIECE = 2 << 20  # bytes that a thread copies at a time: no thread waits longer than this takes for the last one
SMALL = 64 << 10  # bytes of a tensor that is copied before the others would have taken it
WORTH_HELP = 4 << 20  # bytes of a snapshot below which one thread is done before another has begun
MOST_THREADS = 8  # by then the memory is what limits

Move = tuple[int, int, int]
"""to, from, bytes"""


class SnapshotBuffer(Generic[Key]):
    """CPU memory that is laid out once and copied into again and again.

    Fresh memory costs a page fault for every 4 KiB, which is several times the copy itself; so the arena is allocated
    and touched ahead (`reserve`) and reused as long as names, shapes and dtypes stay the same. It is pinned where a
    tensor lives on a GPU. The copies of one snapshot are overwritten by the next.

    Tensors on the CPU are copied by as many threads as torch has, each taking the next one when it is done. torch's own
    copy splits every tensor among all its threads and waits for all of them; where another process holds a core, each
    of those waits is a time slice: 180 tensors took 1.4 s instead of 40 ms.
    """

    def __init__(self) -> None:
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._layout: list[tuple[Key, torch.Size, torch.dtype, bool]] = []
        self._views: dict[Key, torch.Tensor] = {}
        self._places: list[tuple[torch.Tensor, int, int]] = []
        """of each view in order: itself, its address, its bytes"""
        self._helpers: ThreadPoolExecutor | None = None

    @property
    def size_bytes(self) -> int:
        """Memory held."""
        return self._arena.numel()

    def reserve(self, tensors: Mapping[Key, torch.Tensor]) -> None:
        """Lay out and touch the memory for tensors of these shapes and dtypes (`meta` tensors will do)."""
        layout = [(key, tensor.shape, tensor.dtype, tensor.is_cuda) for key, tensor in tensors.items()]
        if layout == self._layout:
            return
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        offsets, total = _offsets(list(tensors.values()))
        if total > self._arena.numel() or (pinned and not self._arena.is_pinned()):
            self._views, self._places = {}, []
            self._arena = torch.empty(0, dtype=torch.uint8)  # let go of the old memory before asking for new
            self._arena = torch.empty(total, dtype=torch.uint8, pin_memory=True) if pinned else _huge_pages(total)
            self._arena.zero_()
        self._views = {
            key: self._arena[offset : offset + _size(tensor)].view(tensor.dtype).view(tensor.shape)
            for (key, tensor), offset in zip(tensors.items(), offsets, strict=True)
        }
        self._places = [(view, view.data_ptr(), _size(view)) for view in self._views.values()]
        self._layout = layout

    def copy(self, tensors: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
        """CPU copies of `tensors` as they are at this moment, complete when this returns."""
        self.reserve(tensors)
        small: list[Move] = []
        moves: deque[Move] = deque()
        devices: set[torch.device] = set()
        with torch.no_grad():
            for tensor, (view, address, size) in zip(tensors.values(), self._places, strict=True):
                if tensor.is_cpu and tensor.is_contiguous() and not tensor.is_complex():  # complex: a conjugate is lazy
                    source = tensor.data_ptr()
                    if size <= SMALL:
                        small.append((address, source, size))
                        continue
                    for start in range(0, size, PIECE):
                        moves.append((address + start, source + start, min(PIECE, size - start)))
                else:
                    view.copy_(tensor, non_blocking=True)
                    devices.add(tensor.device)
        self._move(moves, small)
        for device in devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        return dict(self._views)

    def _move(self, moves: deque[Move], small: list[Move]) -> None:
        helpers = min(torch.get_num_threads(), MOST_THREADS) - 1 if self.size_bytes >= WORTH_HELP else 0
        if helpers and self._helpers is None:
            self._helpers = ThreadPoolExecutor(MOST_THREADS - 1, thread_name_prefix="snapshot")
        helping = [self._helpers.submit(_work_off, moves) for _ in range(helpers)] if self._helpers else []
        for move in small:
            ctypes.memmove(*move)
        _work_off(moves)
        for helper in helping:
            if not helper.cancel():  # one that has not begun by now is not needed
                helper.result()


def arena_bytes(tensors: list[torch.Tensor]) -> int:
    """Memory that a SnapshotBuffer of these tensors (`meta` ones will do) takes."""
    return _offsets(tensors)[1]


def _work_off(moves: deque[Move]) -> None:
    """Copy until nothing is left. Any number of threads at once: taking is atomic, and copying lets others run."""
    while moves:
        try:
            move = moves.popleft()
        except IndexError:  # another thread was faster
            return
        ctypes.memmove(*move)


def _huge_pages(size: int) -> torch.Tensor:
    """So many bytes, on pages of 2 MiB where the system has them: some 7% faster to copy into than pages of 4 KiB."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _offsets(tensors: list[torch.Tensor]) -> tuple[list[int], int]:
    """Where each tensor starts, and how many bytes that is in all."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-_size(tensor) // ALIGNMENT) * ALIGNMENT
    return offsets, end
