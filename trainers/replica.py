"""Replica: a plain module that computes with the weights of a model whose tensors are spread over the workers.

Evaluation, generation and diagnosis call the model as it suits them: on one rank alone, unequally often, with a
key-value cache. A sharded model would wait for the other ranks in every layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


class Replica:
    """The structure of a model, taken before anything is wrapped around it; without weights until it is lent some."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        weights: dict[int, nn.Parameter] = {
            id(parameter): nn.Parameter(parameter.new_empty(0), parameter.requires_grad)
            for parameter in model.parameters()
        }
        # deepcopy takes what it finds in its memo: tied weights stay tied, and no weight is copied
        self._structure: nn.Module = copy.deepcopy(model, memo=dict(weights))

    @contextmanager
    def lent(self, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The module with `weights` (by the names of named_parameters; no copies), the model's buffers and switches."""
        before = {name: parameter.data for name, parameter in self._structure.named_parameters()}
        self._take_over_switches()
        try:
            for name, parameter in self._structure.named_parameters():
                parameter.data = weights[name].detach()
            yield self._structure
        finally:
            for name, parameter in self._structure.named_parameters():
                parameter.data = before[name]

    def _take_over_switches(self) -> None:
        """Training mode, dropout rates, checkpointing: plain attributes that a phase may have changed; and buffers."""
        for mine, theirs in zip(self._structure.modules(), self._model.modules(), strict=True):
            for key, value in theirs.__dict__.items():
                if isinstance(value, bool | int | float) and key in mine.__dict__:
                    mine.__dict__[key] = value
            for name, buffer in theirs._buffers.items():
                mine._buffers[name] = buffer
