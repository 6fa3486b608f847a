"""What the ranks say to each other besides gradients: a few numbers a step, over gloo on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Collective(Protocol):
    rank: int
    world_size: int

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in float64; a collective that never touches the accelerator."""
        ...

    def from_first(self, value: Any) -> Any:
        """Rank 0's JSON-like value on every rank."""
        ...

    def from_any(self, value: Any) -> Any:
        """The value of the lowest rank that has one, on every rank; None where nobody has."""
        ...


class Alone:
    """One process: nothing to ask."""

    rank = 0
    world_size = 1

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def from_first(self, value: Any) -> Any:
        return value

    def from_any(self, value: Any) -> Any:
        return value


class Group:
    """The default process group; its CPU backend must be gloo (`cpu:gloo,cuda:nccl` on GPUs)."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum(self, values: Sequence[float]) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers)
        return numbers.tolist()

    def from_first(self, value: Any) -> Any:
        return self._from(0, value)

    def from_any(self, value: Any) -> Any:
        has_one = self.sum([rank == self.rank and value is not None for rank in range(self.world_size)])
        return self._from(has_one.index(1.0), value) if any(has_one) else None

    def _from(self, rank: int, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=rank, device=torch.device("cpu"))
        return box[0]


def collective(world_size: int) -> Collective:
    """How this process reaches its peers."""
    return Group() if world_size > 1 else Alone()
