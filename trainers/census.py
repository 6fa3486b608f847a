"""What a run's tensors really are: bytes by dtype of weights, gradients and optimizer state on this worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainers.config import OptimConfig, PrecisionConfig

Sizes = dict[str, int]
"""dtype -> bytes, the most first"""

CENSUS = "logs/census.json"
"""in the run's folder"""
NAMED = 4  # tensors that a sentence names before it counts the rest


@dataclass(frozen=True)
class Census:
    """Taken after the first step, when all of it is there."""

    bytes: Mapping[str, Sizes]
    """of each part: parameters, master weights (where the model computes with copies), gradients, optimizer state"""
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

    def to_json(self) -> dict[str, object]:
        """All of it, for the file CENSUS."""
        return {
            "bytes": self.bytes,
            "tensors_with_state": self.state_count,
            "without_8_bit_state": list(self.wide_state),
        }


_PARTS = {
    "parameters": "parameters",
    "masters": "master weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
}


def gradient_sizes(gradients: Iterable[Tensor]) -> Sizes:
    """What this worker holds for its gradients: of each storage all, for most are parts of a buffer."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    for gradient in gradients:
        storage = _local(gradient).untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes[_name(gradient.dtype)] += storage.nbytes()
    return dict(sizes.most_common())


def take_census(model: nn.Module, optimizer: Optimizer, gradients: Sizes, masters: Iterable[Tensor]) -> Census:
    """What this worker holds now; of sharded tensors its own slice. Each storage counts once.

    `gradients` as they were before the update let go of them; `masters`: the weights that it updates where the model
    computes with copies of another type or cut.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {  # under ZeRO the parameters of the optimizer are flat slices, which have no names
        parameter: [value for value in kept.values() if isinstance(value, Tensor)]
        for parameter, kept in optimizer.state.items()
    }
    return Census(
        {
            "parameters": _sizes(_weights(model)),
            "masters": _sizes(masters),
            "gradients": gradients,
            "optimizer": _sizes(tensor for tensors in state.values() for tensor in tensors),
        },
        wide_state=tuple(
            names.get(id(parameter), "a slice")
            for parameter, tensors in state.items()
            if tensors and all(tensor.dtype != torch.uint8 for tensor in tensors)
        ),
        state_count=sum(1 for tensors in state.values() if tensors),
    )


def _weights(model: nn.Module) -> Iterable[Tensor]:
    """Parameters, and what quantised layers keep besides their codes."""
    yield from model.parameters()
    for module in model.modules():
        scales = getattr(module, "scales", None)
        if callable(scales):
            yield from scales().values()


def _sizes(tensors: Iterable[Tensor]) -> Sizes:
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    for tensor in tensors:
        local = _local(tensor)
        if local.numel() and local.data_ptr() not in seen:
            seen.add(local.data_ptr())
            sizes[_name(local.dtype)] += local.numel() * local.element_size()
    return dict(sizes.most_common())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _local(tensor: Tensor) -> Tensor:
    """The slice of a tensor that FSDP2 or ZeRO-3 has cut; any other as it is."""
    if hasattr(tensor, "ds_tensor"):
        return cast(Tensor, tensor.ds_tensor)
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def _described(sizes: Sizes) -> str:
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
    more = f" and {len(names) - NAMED} more, all in {CENSUS}" if len(names) > NAMED else ""
    return f" ({', '.join(names[:NAMED])}{more})"
