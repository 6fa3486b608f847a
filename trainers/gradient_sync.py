"""DistributedDataParallel with its gradient buckets in their final places before the first update."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """`model` with gradients averaged over the ranks of the default process group. A collective.

    static_graph stays off: it records its hooks in the first backward, which under gradient accumulation is one that
    does not synchronise.
    """
    assert dist.is_initialized(), "data parallelism needs an initialised process group"
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers to forward_sync_buffers, which older ones do not know
        warnings.simplefilter("ignore", FutureWarning)
        ddp = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )
    _settle_buckets(ddp)
    return ddp


class _Touch(nn.Module):
    """A forward that gives every parameter a zero gradient, the last parameter first."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._parameters_to_touch = tuple(parameters)  # a tuple: not registered a second time

    def forward(self, start: Tensor) -> Tensor:
        total = start
        for parameter in self._parameters_to_touch:
            total = total + 0.0 * parameter.sum()
        return total


def _settle_buckets(ddp: DistributedDataParallel) -> None:
    """Let DDP rebuild its buckets now, on a backward of zeros, in reverse order of registration.

    DDP starts with all gradients in one bucket and after its first backward lays them out anew, once, in order of
    arrival. From three ranks on, the place of a gradient in its bucket decides in which order an all-reduce adds the
    ranks' values. A restarted run would so take its first update in the first layout where the uninterrupted one
    takes it in the second, and end with other bits.
    """
    model = ddp.module
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ddp.module = _Touch(parameters)
    ddp(torch.zeros((), device=parameters[0].device)).backward()  # on a GPU, DDP wants an input to move there
    ddp.module = model
    for parameter in parameters:
        parameter.grad = None
