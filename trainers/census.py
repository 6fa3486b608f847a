"""What a run's tensors really are: bytes by dtype of parameters, gradients and optimizer state on this worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainers.config import OptimConfig, PrecisionConfig

NAMED = 4  # tensors that a sentence names before it counts the rest


@dataclass(frozen=True)
class Census:
    """Taken between the backward and the update, when all of it is there."""

    bytes: Mapping[str, Mapping[str, int]]
    """part (parameters, gradients, optimizer) -> dtype -> bytes; the dtype with the most first"""
    wide_state: tuple[str, ...]
    """parameters whose optimizer state has no 8-bit tensor"""
    state_count: int
    """parameters with optimizer state"""

    def metrics(self) -> dict[str, float]:
        """`dtypes/optimizer/uint8_bytes` and its share, and so on, for the record."""
        found: dict[str, float] = {}
        for part, sizes in self.bytes.items():
            total = sum(sizes.values())
            for dtype, size in sizes.items():
                found[f"dtypes/{part}/{dtype}_bytes"] = float(size)
                found[f"dtypes/{part}/{dtype}_share"] = size / total
        return found

    def sentences(self, precision: PrecisionConfig, optim: OptimConfig) -> str:
        """For the person."""
        parts = "; ".join(f"{_PARTS[part]} {_described(sizes)}" for part, sizes in self.bytes.items() if sizes)
        told = f"after the first step: {parts}."
        if precision.optimizer_state == "int8":
            told += (
                f" optim.min_8bit_size={optim.min_8bit_size}: {len(self.wide_state)} of {self.state_count} tensors "
                f"have fewer values and keep 32-bit state{_listed(self.wide_state)}."
            )
        return told


_PARTS = {"parameters": "parameters", "gradients": "gradients", "optimizer": "optimizer state"}


def take_census(model: nn.Module, optimizer: Optimizer) -> Census:
    """What this worker holds now; of sharded tensors its own slice. Each storage counts once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wide = tuple(
        names.get(id(parameter), "?")
        for parameter, state in optimizer.state.items()
        if state and all(tensor.dtype != torch.uint8 for tensor in state.values())
    )
    gradients = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    state = (tensor for kept in optimizer.state.values() for tensor in kept.values())
    return Census(
        {"parameters": _sizes(_weights(model)), "gradients": _sizes(gradients), "optimizer": _sizes(state)},
        wide_state=wide,
        state_count=sum(1 for kept in optimizer.state.values() if kept),
    )


def _weights(model: nn.Module) -> Iterable[Tensor]:
    """Parameters, and what quantised layers keep besides their codes."""
    yield from model.parameters()
    for module in model.modules():
        scales = getattr(module, "scales", None)
        if callable(scales):
            yield from scales().values()


def _sizes(tensors: Iterable[Tensor]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if local.numel() and local.data_ptr() not in seen:
            seen.add(local.data_ptr())
            sizes[str(local.dtype).removeprefix("torch.")] += local.numel() * local.element_size()
    return dict(sizes.most_common())


def _described(sizes: Mapping[str, int]) -> str:
    total = sum(sizes.values())
    shares = ", ".join(f"{size / total:.1%} {dtype}" for dtype, size in sizes.items())
    return f"{_amount(total)} ({shares})"


def _amount(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"


def _listed(names: tuple[str, ...]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f" ({', '.join(names[:NAMED])}{more})"
