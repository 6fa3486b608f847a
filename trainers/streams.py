"""Streams: the runtime state that a recurrent or memory model carries from one step's rows to the next's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trainers.data.types import Batch
from trainers.models.state import LanguageModel, State

PREFIX = "stream/"


def carries_streams(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether what a rank saved holds the state of streams."""
    return any(name.startswith(PREFIX) for name in tensors)


class Streams:
    """The state of each micro-batch's rows on this rank; for a model without any, `enter` gives None and that is all.

    A micro-batch keeps its place in the step, so its rows go on where the same rows ended one step before.
    """

    def __init__(self, model: LanguageModel, rows: int, micro_batches: int, device: torch.device):
        self._model, self._rows, self._device = model, rows, device
        self._states: list[State | None] = [None] * micro_batches

    def begin(self) -> None:
        """Every stream anew: a new phase reads other text."""
        self._states = [self._fresh() for _ in self._states]

    def enter(self, index: int, batch: Batch) -> State | None:
        """The state that micro-batch `index` goes on from; fresh in the rows where a text begins."""
        state = self._states[index]
        if state is None or (batch.starts is not None and not bool(batch.starts.any())):
            return state
        fresh = self._fresh()
        if fresh is None or batch.starts is None:  # shuffled rows: none goes on where another ended
            return fresh
        starts = batch.starts.to(self._device)
        return {
            name: torch.where(starts.view(-1, *[1] * (tensor.dim() - 1)), fresh[name], tensor)
            for name, tensor in state.items()
        }

    def leave(self, index: int, state: State | None) -> None:
        """Keep the state without its graph: gradients end at the chunk's border (truncated back-propagation)."""
        self._states[index] = None if state is None else {name: tensor.detach() for name, tensor in state.items()}

    def tensors(self) -> State:
        """By name, for a checkpoint."""
        return {
            f"{PREFIX}{index}/{name}": tensor
            for index, state in enumerate(self._states)
            for name, tensor in (state or {}).items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self._states = [None] * len(self._states)
        for key, tensor in tensors.items():
            if key.startswith(PREFIX):
                index, name = key.removeprefix(PREFIX).split("/", 1)
                self._states[int(index)] = {**(self._states[int(index)] or {}), name: tensor.to(self._device)}

    def _fresh(self) -> State | None:
        state = self._model.initial_state(self._rows)
        return None if state is None else {name: tensor.to(self._device) for name, tensor in state.items()}
