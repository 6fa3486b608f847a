"""Language models: built from a ModelConfig, counted without allocating, switched between phases."""

from __future__ import annotations

import torch
from torch import nn

from trainers.config import ModelConfig
from trainers.errors import ConfigError
from trainers.models.gpt import GPT
from trainers.models.initialise import initialise
from trainers.models.state import State

__all__ = ["GPT", "State", "apply_switches", "build_model", "meta_model", "parameter_count"]


def build_model(config: ModelConfig, vocab_size: int) -> GPT:
    """A GPT with its initial weights on torch's default device: a function of the configuration and the global seed.

    vocab_size is the tokenizer's; a larger config.vocab_size wins. ConfigError where it is smaller.
    """
    device = torch.get_default_device()
    model = meta_model(config, vocab_size).to_empty(device=device)  # so that every weight is drawn once, not twice
    initialise(model)
    return model


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Trainable parameters, a tied matrix counted once; allocates nothing. ConfigError as build_model."""
    return sum(parameter.numel() for parameter in meta_model(config, vocab_size).parameters())


def apply_switches(model: nn.Module, config: ModelConfig) -> None:
    """Sets in place what a phase may change: dropout everywhere it is drawn, and activation checkpointing.

    Works on wrapped models and on builders' own: any module with a float `dropout` or a bool
    `activation_checkpointing`, and nn.Dropout. ConfigError where checkpointing is asked of a model without it.
    """
    switchable = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.dropout
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = config.dropout  # type: ignore[assignment]
        if isinstance(getattr(module, "activation_checkpointing", None), bool):
            module.activation_checkpointing = config.activation_checkpointing  # type: ignore[assignment]
            switchable = True
    if config.activation_checkpointing and not switchable:
        raise ConfigError(
            f"model.activation_checkpointing=true, but {type(model).__name__} has no such switch: set it to false."
        )


def meta_model(config: ModelConfig, vocab_size: int) -> GPT:
    """The model on the meta device: shapes without memory. ConfigError as build_model."""
    with torch.device("meta"):
        return GPT(config, _vocabulary(config, vocab_size))


def _vocabulary(config: ModelConfig, vocab_size: int) -> int:
    """Rows of the embedding."""
    if config.vocab_size is None:
        return vocab_size
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size ({config.vocab_size}) is smaller than the tokenizer's vocabulary ({vocab_size}): "
            f"raise it to at least {vocab_size}, or leave it out."
        )
    return config.vocab_size
