"""SmallBuild: a few layers of a model, run as training runs it, to be watched."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers import int8_linear
from trainers.config import ModelConfig, PrecisionConfig
from trainers.data.types import Batch
from trainers.memory.recorder import Recorder, Trace
from trainers.models.gpt import GPT
from trainers.objectives import Objective
from trainers.precision import autocast
from trainers.weights import prepare_weights

Kernels = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Passes:
    """What was seen of the small build."""

    traces: tuple[Trace, Trace, Trace]
    """first micro-batch, later one, evaluated batch"""
    saved: np.ndarray
    """(2, 2): saved bytes outside the layers, and of one layer; fixed and a row"""


class SmallBuild:
    """A model of few layers without memory; to be made and used under ShapesOnly."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, length: int, precision: PrecisionConfig, objective: Objective
    ):
        self.model = GPT(config, vocab_size)
        shape_weights(self.model, precision)
        self.length, self.precision, self.objective = length, precision, objective
        layer = self.model.blocks[len(self.model.blocks) // 2]
        self.layer_gradients = sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad)

    def passes(self, rows: int) -> Passes:
        """A micro-batch and an evaluated batch of `rows` rows."""
        self.model.train()
        trained = self._record(rows, self._train)
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        scored = self._record(rows, self._score)
        traces = trained.trace(rows), trained.trace(rows, standing=True), scored.trace(rows)
        return Passes(traces, trained.saved.bytes(rows))

    def _record(self, rows: int, work: Callable[[Batch, Recorder], None]) -> Recorder:
        tokens = torch.zeros((rows, self.length), dtype=torch.long)
        batch = Batch(tokens=tokens, targets=torch.zeros_like(tokens), n_targets=rows * self.length, starts=None)
        recorder = Recorder(self.model)
        with recorder:
            work(batch, recorder)
        recorder.close()
        return recorder

    def _train(self, batch: Batch, recorder: Recorder) -> None:
        with autocast(self.precision, torch.device("cpu")):
            with recorder.saved.seen():
                loss = self.objective.loss(self.model, batch, None)
            total = loss.total / batch.n_targets
            recorder.turn()
            with torch.autocast("cpu", enabled=False):
                torch.autograd.backward(total, total.detach() * 0.0 + 1.0)

    def _score(self, batch: Batch, recorder: Recorder) -> None:
        with torch.no_grad(), autocast(self.precision, torch.device("cpu")):
            self.objective.scores(self.model, batch, None)


def shape_weights(model: GPT, precision: PrecisionConfig) -> None:
    """Give `model` the layers that `precision` computes with; a 4-bit base computes in the shapes of a plain one."""
    if not precision.adapter_rank:
        prepare_weights(model, precision)
        return
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in [*model.blocks.modules()]:
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                setattr(module, name, Adapted(layer, precision.adapter_rank))


class Adapted(nn.Module):
    """A frozen linear layer under a LoRA adapter, operation by operation as peft has it, which cannot be built here."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        out: Tensor = self.base(x)
        return out + self.up(self.down(x.to(self.down.weight.dtype))) * 2.0


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection inside: when it comes would decide what lives."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """CUDA's ways in place of the CPU's: dropout keeps a mask of bytes, attention never its weights, int8 products sum
    integers.

    So that a machine without a GPU can plan for one. Names of modules are exchanged for the while: a TorchFunctionMode
    is not active where activation checkpointing runs a layer again.
    """
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def masked(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p > 0 else x

    def fused(*args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **{**kwargs, "dropout_p": 0.0})

    def integers(left: Tensor, right: Tensor) -> Tensor:
        return torch._int_mm(left, right.t()).float()

    product = int8_linear.int8_product
    F.dropout, F.scaled_dot_product_attention = masked, fused  # type: ignore[assignment]
    int8_linear.int8_product = integers
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, attention
        int8_linear.int8_product = product
