"""Weight-decay groups and optimizers, as pure functions of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from trainers.config import OptimConfig, PrecisionConfig

CONSTANTS = ("qmap1", "qmap2")
"""state of bitsandbytes' optimizers that is a constant of the method, one tensor for all parameters"""

# ---- weight decay ------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters with their weight decay: at most two groups, `params` as (name, tensor) pairs.

    `optim.decay` says which are decayed: `linear` the weights of Linear layers (a matrix tied to an embedding counts
    as embedding), `matrices` every tensor of two or more dimensions, `all` every one.
    """
    decayed = _decayed(model, optim)
    groups: dict[float, list[tuple[str, nn.Parameter]]] = {optim.weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[optim.weight_decay if id(parameter) in decayed else 0.0].append((name, parameter))
    return [{"params": members, "weight_decay": decay} for decay, members in groups.items() if members]


def _decayed(model: nn.Module, optim: OptimConfig) -> set[int]:
    if optim.decay == "all":
        return {id(parameter) for parameter in model.parameters()}
    if optim.decay == "matrices":
        return {id(parameter) for parameter in model.parameters() if parameter.dim() >= 2}
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    return linear - {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


# ---- optimizers --------------------------------------------------------------------------------------


def build_optimizer(
    groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device, precision: PrecisionConfig
) -> Optimizer:
    """The configured optimizer: torch's, fused where it has a kernel (all but rmsprop, on CPU and CUDA), else foreach;
    bitsandbytes' for 8-bit state, lion and ademamix.

    Its state is there from the start, zero as at the first step, so that a checkpoint of step 0 has the names of any
    other and an update that is skipped on the device leaves nothing uninitialised.
    """
    by_bitsandbytes = precision.optimizer_state == "int8" or optim.name in ("lion", "ademamix")
    if by_bitsandbytes:
        from trainers.optim_8bit import build_bitsandbytes

        optimizer = build_bitsandbytes(groups, optim, 8 if precision.optimizer_state == "int8" else 32)
    else:
        optimizer = _construct(groups, optim, device)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = _fresh_state(parameter, optim, fused=bool(group.get("fused")))
    if not precision.bf16_weights:
        return optimizer
    from trainers.rounding import rounded_adamw, rounded_bitsandbytes

    return rounded_bitsandbytes(optimizer) if by_bitsandbytes else rounded_adamw(optimizer)


def heeds_found_inf(optimizer: Optimizer) -> bool:
    """Whether its step leaves everything as it is where its `found_inf` is 1, so that the host need not know."""
    return all(group.get("fused") for group in optimizer.param_groups)


def state_tensors(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Everything it keeps as `exp_avg/<parameter>` and so on, live storage; `names`: those of parameters by their id.

    Constants of the method that all parameters share are left out.
    """
    return {
        f"{kind}/{names[id(parameter)]}": tensor
        for parameter, state in optimizer.state.items()
        for kind, tensor in state.items()
        if kind not in CONSTANTS
    }


def _construct(groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device) -> Optimizer:
    fused = device.type in ("cpu", "cuda")
    kernel: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    if optim.name == "adamw":
        return AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, **kernel)
    if optim.name == "adam":
        return Adam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, **kernel)
    if optim.name == "sgd":
        return SGD(groups, lr=optim.lr, momentum=optim.momentum, **kernel)
    return RMSprop(groups, lr=optim.lr, alpha=optim.alpha, eps=optim.eps, momentum=optim.momentum, foreach=True)


def _fresh_state(parameter: nn.Parameter, optim: OptimConfig, *, fused: bool) -> dict[str, Tensor]:
    if optim.name in ("adamw", "adam"):
        names, counts = ["exp_avg", "exp_avg_sq"], True
    elif optim.name == "sgd":
        names, counts = ["momentum_buffer"] if optim.momentum else [], False
    else:
        names, counts = ["square_avg", "momentum_buffer"] if optim.momentum else ["square_avg"], True
    wide = torch.promote_types(parameter.dtype, torch.float32)  # also under bf16 weights
    state = {name: torch.zeros_like(parameter, dtype=wide, memory_format=torch.preserve_format) for name in names}
    if counts:  # fused kernels count on the device, the others on the host, where float32 counts to 2**24 exactly
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
    return state
