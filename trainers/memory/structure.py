"""Structure: the bytes of a run that its model alone decides, read off the model on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from trainers.config import ModelConfig, OptimConfig
from trainers.memory.words import ALONE, FP32, Kept, Spread, Words, counts_steps, optimizer_values
from trainers.models import meta_model
from trainers.models.state import LanguageModel
from trainers.safetensors_io import file_size
from trainers.seeds import rng_tensors
from trainers.snapshot import arena_bytes


@dataclass(frozen=True)
class Parameter:
    """One trainable tensor, tied ones once."""

    name: str
    shape: tuple[int, ...]
    linear: bool
    """the weight of a linear layer of a block, which 4-bit storage covers and an adapter lies on"""

    @property
    def values(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one worker holds whatever the batch."""

    weights: int
    """tables of positions included"""
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Structure:
    """A model's parameters and tables, without their memory."""

    parameters: tuple[Parameter, ...]
    buffer_bytes: int
    """tables that no checkpoint keeps"""
    state_row_bytes: int
    """runtime state that a recurrent model carries, for each row"""
    rank_bytes: int
    """of the file that each worker adds to a checkpoint: its random generators"""
    rank_arena_bytes: int
    """of their copy in a snapshot"""

    @property
    def values(self) -> int:
        """Trainable parameters."""
        return sum(parameter.values for parameter in self.parameters)

    def state_bytes(self, optim: OptimConfig, words: Words, spread: Spread = ALONE) -> StateBytes:
        """Weights, gradients and optimizer state on one worker's device, exactly but for the padding of parts."""
        words = spread.words(words)
        trained = self.trained(words)
        moments, counter = optimizer_values(optim), words.counter if counts_steps(optim, words) else 0
        weights = sum(self._kept(each, words).bytes(each.values) for each in self.parameters)
        weights += sum(words.gradients.bytes(values) for values in trained) if words.adapter_rank else 0
        gradients = sum(words.gradients.bytes(values) for values in trained)
        optimizer = sum(moments * words.moments.bytes(values) + counter for values in trained)
        if spread.master:
            optimizer += sum(FP32.bytes(values) for values in trained)
        return StateBytes(
            spread.part("weights", weights) + self.buffer_bytes,
            spread.part("gradients", gradients),
            spread.part("optimizer", optimizer),
        )

    def weight_bytes(self, words: Words) -> int:
        """All weights, tables of positions aside, made whole."""
        return sum(words.weights.bytes(each.values) for each in self.parameters)

    def layer_bytes(self, words: Words) -> int:
        """Weights of one layer."""
        return sum(words.weights.bytes(each.values) for each in self.parameters if each.name.startswith("blocks.0."))

    def outer_bytes(self, words: Words) -> int:
        """Weights that belong to no layer: embeddings, the last norm, the head."""
        return sum(words.weights.bytes(each.values) for each in self.parameters if not each.name.startswith("blocks."))

    def _kept(self, parameter: Parameter, words: Words) -> Kept:
        return FP32 if words.adapter_rank and not parameter.linear else words.weights

    def trained(self, words: Words) -> list[int]:
        """Values of each tensor that is trained: the parameters, or the two adapters of each linear weight."""
        if not words.adapter_rank:
            return [parameter.values for parameter in self.parameters]
        linear = [parameter.shape for parameter in self.parameters if parameter.linear]
        return [words.adapter_rank * size for shape in linear for size in shape]

    def checkpoint_bytes(self, optim: OptimConfig, words: Words) -> int:
        """The tensor files of a checkpoint by one worker: weights, optimizer state, random generators.

        Exact where state is kept in fp32.
        """
        if words != Words():
            state = self.state_bytes(optim, words)
            weights = sum(map(words.gradients.bytes, self.trained(words)))  # adapters alone, where there are any
            return weights + state.optimizer + self.rank_bytes
        return file_size(self._tensors("")) + file_size(self._optimizer(optim)) + self.rank_bytes

    def snapshot_bytes(self, optim: OptimConfig, words: Words) -> int:
        """Memory that a save in the background copies the state into."""
        if words != Words():
            return self.checkpoint_bytes(optim, words)
        kept = [*self._tensors("").values(), *self._optimizer(optim).values()]
        return arena_bytes(kept) + self.rank_arena_bytes

    def _tensors(self, kind: str) -> dict[str, Tensor]:
        prefix = f"{kind}/" if kind else ""
        return {f"{prefix}{each.name}": torch.empty(each.shape, device="meta") for each in self.parameters}

    def _optimizer(self, optim: OptimConfig) -> Mapping[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for kind in STATE_NAMES[optim.name][: optimizer_values(optim)]:
            tensors |= self._tensors(kind)
        if counts_steps(optim, Words()):
            tensors |= {f"step/{each.name}": torch.empty((), device="meta") for each in self.parameters}
        return tensors


STATE_NAMES = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "rmsprop": ("square_avg", "momentum_buffer"),
}
"""optimizer -> what torch calls its state"""


def read_structure(config: ModelConfig, vocab_size: int) -> Structure:
    """The Structure of a model; allocates nothing. ConfigError as `build_model` raises it."""
    # what a phase or a variant of a plan may switch changes no parameter: the model is built once for all of them
    return _read(config.model_copy(update={"dropout": 0.0, "activation_checkpointing": False}), vocab_size)


@lru_cache(maxsize=32)
def _read(config: ModelConfig, vocab_size: int) -> Structure:
    model = meta_model(config, vocab_size)
    linear = {id(module.weight) for module in model.blocks.modules() if isinstance(module, nn.Linear)}
    with torch.device("meta"):
        state = cast(LanguageModel, model).initial_state(1)
    generators = rng_tensors()
    return Structure(
        parameters=tuple(
            Parameter(name, tuple(parameter.shape), id(parameter) in linear)
            for name, parameter in model.named_parameters()
        ),
        buffer_bytes=sum(_bytes(buffer) for buffer in model.buffers()),
        state_row_bytes=sum(_bytes(tensor) for tensor in (state or {}).values()),
        rank_bytes=file_size(generators),
        rank_arena_bytes=arena_bytes(list(generators.values())),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
