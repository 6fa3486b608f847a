"""A limit on the memory of this process or device, and what running into one looks like. Imports torch in functions."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trainers.memory.resident import resident_peak, status_bytes

if TYPE_CHECKING:
    import torch

SLACK_BYTES = 512 << 20  # address space beyond the memory that counts: what is set aside and never touched
THREAD_BYTES = 136 << 20  # of address space: a thread's stack and its malloc arena
OUT_OF_MEMORY = re.compile(
    r"out of ?memory|low on memory|not enough memory|n.t allocate memory|bad_alloc|could not create a memory|"
    r"ALLOC_FAILED",
    re.I,
)


@contextmanager
def held_to(limit_bytes: int | None, threads: int, device: torch.device) -> Iterator[None]:
    """Inside, a run on `device` takes little more than `limit_bytes` of the memory that counts there (on CUDA: the
    device's, else this process's); None: whatever there is."""
    if limit_bytes is None:
        yield
        return
    memory = memory_of(device, limit_bytes, threads)
    memory.hold_to_limit()
    try:
        yield
    finally:
        memory.lift()


def memory_of(device: torch.device, limit_bytes: int | None, threads: int) -> Memory:
    """The memory that counts on `device`, with its limit; None: what a CUDA device has free."""
    if device.type == "cuda":
        return CudaMemory(device, limit_bytes)
    assert limit_bytes is not None, "memory of a process has a limit"
    return ProcessMemory(limit_bytes, threads)


class ProcessMemory:
    """The resident memory of this process, and address space as a belt against taking much more than the limit.

    On Apple's MPS the GPU's memory is the machine's; it is counted like the CPU's, which the authors could not try.
    """

    def __init__(self, limit_bytes: int, threads: int):
        self.limit_bytes = limit_bytes
        self._threads = threads
        self._lifted: tuple[int, int] | None = None

    def hold_to_limit(self) -> None:
        """From now on asking for much more than the limit fails, instead of taking it. MemoryError if it is taken."""
        import resource

        resident, reserved = status_bytes("VmRSS"), status_bytes("VmSize")
        if resident is None or reserved is None:
            return  # no /proc: macOS, whose kernel does not heed RLIMIT_AS either
        if resident > self.limit_bytes:
            raise MemoryError(f"out of memory before the first step: {resident} bytes are taken")
        room = self.limit_bytes - resident + SLACK_BYTES + self._threads * THREAD_BYTES
        self._lifted = resource.getrlimit(resource.RLIMIT_AS)
        hard = self._lifted[1]
        soft = reserved + room if hard == resource.RLIM_INFINITY else min(reserved + room, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def lift(self) -> None:
        """The belt off: what happened has to be written."""
        import resource

        if self._lifted is not None:
            resource.setrlimit(resource.RLIMIT_AS, self._lifted)

    def peak(self) -> int:
        """Bytes resident at most so far."""
        return resident_peak()

    def reserved(self) -> int | None:
        return None


class CudaMemory:
    """The memory of one CUDA device that torch's allocator takes."""

    def __init__(self, device: torch.device, limit_bytes: int | None):
        import torch

        self._device = device
        free, total = torch.cuda.mem_get_info(device)
        self.limit_bytes: int = limit_bytes or free
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.limit_bytes / total), device)

    def hold_to_limit(self) -> None:
        """The allocator has kept to it from the start."""

    def lift(self) -> None:
        """Nothing to take off: the answer needs no device memory."""

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated(self._device)

    def reserved(self) -> int | None:
        import torch

        return torch.cuda.max_memory_reserved(self._device)


Memory = ProcessMemory | CudaMemory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, of its libraries or of the system says that memory was refused."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))
