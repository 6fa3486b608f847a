"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685; by peft) over the frozen weights of a finished run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from trainers.config import PrecisionConfig
from trainers.nf4 import Nf4Linear, quantise

ADAPTER = "default"  # peft's name of the only one
MARK = ".lora_"  # in the name of every parameter of an adapter
BASE = ".base_layer"  # what peft puts between a layer's name and its own parameters


def adapt(model: nn.Module, precision: PrecisionConfig) -> None:
    """Freeze `model` and put adapters, which change nothing yet, on the linear layers of its blocks.

    Under weights=nf4 those layers are quantised. The output layer and the embeddings stay as they are. Draws from
    torch's global generator.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = block_layers(model)
    if precision.weights == "nf4":
        quantise(model, names)
    settings = LoraConfig(
        r=precision.adapter_rank,
        lora_alpha=precision.adapter_alpha,
        target_modules=names,
        lora_dropout=0.0,
        bias="none",
    )
    inject_adapter_in_model(settings, model, ADAPTER)


def block_layers(model: nn.Module) -> list[str]:
    """The linear layers but the output layer (`head`), whose errors would go straight into the loss."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and _last(name) != "head"]


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def kept_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What a checkpoint holds, by name: the adapters where there are any, else every parameter."""
    named = list(model.named_parameters())
    return [(name, parameter) for name, parameter in named if MARK in name] or named


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with an adapter, by the name they had without it."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of an adapted model as one without adapters has them: W + (alpha / rank) B A, in float32.

    4-bit weights count as what they stand for: the adapters were trained over those, not over what was quantised.
    """
    merged = {
        name.replace(BASE, ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if MARK not in name
    }
    for name, layer in adapted_layers(model):
        base = layer.base_layer
        weight = base.dequantised() if isinstance(base, Nf4Linear) else base.weight.detach().float()
        update = layer.lora_B[ADAPTER].weight.detach().float() @ layer.lora_A[ADAPTER].weight.detach().float()
        merged[f"{name}.weight"] = weight + layer.scaling[ADAPTER] * update
    return merged
