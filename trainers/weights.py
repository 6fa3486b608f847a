"""The weights of a model as `precision` has them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from trainers.adapters import adapt, block_layers, kept_parameters
from trainers.base_weights import base_checkpoint, check_base
from trainers.config import PrecisionConfig
from trainers.errors import CheckpointError
from trainers.int8_linear import use_int8
from trainers.manifest import Checkpoint
from trainers.nf4 import quantise


def prepare_weights(model: nn.Module, precision: PrecisionConfig, base: Checkpoint | None = None) -> None:
    """Change a model that was built in fp32, in place: int8 products, bf16 parameters, or `base` under adapters."""
    if precision.weights == "int8":
        use_int8(model)
    if precision.bf16_weights:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    if precision.adapter_rank:
        assert base is not None, "adapters lie over the weights of a run"
        load_weights(model, base)
        adapt(model, precision)


def open_weights(model: nn.Module, checkpoint: Checkpoint, precision: PrecisionConfig, run_dir: Path) -> None:
    """Put what a run has trained into a model that was built in fp32, in place, in the form `precision` has for it.

    Raises CheckpointError where the checkpoint, or the base under its adapters, is not whole.
    """
    said = checkpoint.meta.get("base")
    if said is None:
        load_weights(model, checkpoint)
        if precision.weights == "nf4":
            quantise(model, block_layers(model))
        elif precision.weights == "int8":
            use_int8(model)
        return
    base = base_checkpoint(run_dir, None)
    check_base(said, base, checkpoint.path)
    prepare_weights(model, precision, base)
    tensors = checkpoint.load("model")
    missing = sorted({name for name, _ in kept_parameters(model)} - tensors.keys())
    if missing:
        raise CheckpointError(f"{checkpoint.path} lacks {', '.join(missing[:3])}: it was written for other adapters.")
    model.load_state_dict(tensors, strict=False)


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put the checkpoint's weights into the model. CheckpointError where they are of another shape of model."""
    tensors = checkpoint.load("model")
    needed = {name for name, _ in model.named_parameters()}  # a tied matrix has one name here and two in state_dict
    missing = sorted(needed - tensors.keys())
    if missing:
        raise CheckpointError(f"{checkpoint.path} lacks {', '.join(missing[:3])}: it was written for another model.")
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint.path} does not fit its own model: {str(error).splitlines()[-1].strip()}"
        ) from error
