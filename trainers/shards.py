"""Shards: a model whose weights, gradients and optimizer state are cut into one slice for each rank (FSDP2).

Zhao et al. 2023 (arXiv:2304.11277) in the form of torch's `fully_shard`: every tensor is cut along its first
dimension. Each rank saves its own slices, and whoever reads the checkpoint puts them together, so any number of ranks
cuts them anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.manifest import part_stem
from trainers.replica import Replica


class Shards:
    """`model` sharded in place over the default process group. A collective, and so is what gathers.

    Compiled layer by layer: FSDP2 gathers and lets go in hooks around each, at which a graph of the whole model breaks.
    """

    def __init__(self, model: nn.Module, *, compile: bool = False) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._replica = Replica(model)
        device_type = next(model.parameters()).device.type
        mesh = init_device_mesh(device_type, (dist.get_world_size(),))
        for unit in _units(model):
            if compile:
                unit.forward = torch.compile(unit.forward)
            fully_shard(unit, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self._model = model

    def exchange(self, enabled: bool) -> None:
        """Whether the next backward sends the gradients to their owners, or adds to those it has whole."""
        cast(Any, self._model).set_requires_gradient_sync(enabled)

    def fit(self, optimizer: torch.optim.Optimizer) -> None:
        """Let it step through slices: torch's fused kernel of SGD takes whole tensors only."""
        if isinstance(optimizer, torch.optim.SGD):
            for group in optimizer.param_groups:
                group.update(fused=False, foreach=True)

    def gathered(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor, on every rank."""
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def collected(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Whole copies on the CPU of rank 0, gathered one after the other; nothing on other ranks."""
        whole: dict[str, dict[str, Tensor]] = {}
        for stem, named in files.items():
            for name, tensor in named.items():
                copy = self.gathered(tensor)
                if dist.get_rank() == 0:
                    whole.setdefault(stem, {})[name] = copy.to("cpu")
        return whole

    def parts(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """This rank's slices, live, each file of them named as this rank's part; what is not cut is in rank 0's."""
        rank = dist.get_rank()
        return {
            part_stem(stem, rank): {
                name: mine for name, tensor in named.items() if (mine := _own(tensor, rank)) is not None
            }
            for stem, named in files.items()
        }

    def put(self, target: Tensor, whole: Tensor) -> None:
        """This rank's slice of `whole` into `target`."""
        from torch.distributed.tensor import DTensor

        if not isinstance(target, DTensor):
            target.copy_(whole)
            return
        slices = whole.chunk(dist.get_world_size(), dim=0)  # as Shard(0) cuts; there may be fewer slices than ranks
        if dist.get_rank() < len(slices):
            target.to_local().copy_(slices[dist.get_rank()])

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """A plain module with all weights on this rank."""
        weights = {name: self.gathered(parameter.detach()) for name, parameter in self._model.named_parameters()}
        with self._replica.lent(weights) as module:
            yield module


def _own(tensor: Tensor, rank: int) -> Tensor | None:
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor if rank == 0 else None
    local = tensor.to_local()
    return local if len(local) else None  # there may be fewer slices than ranks


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """What is gathered and let go of at once: the layers of the outermost lists; the rest goes with the model."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _units(child)
