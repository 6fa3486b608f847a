"""Weight-decay groups and optimizers, as pure functions of the configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from trainers.config import OptimConfig

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


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device) -> Optimizer:
    """The configured torch optimizer: fused where torch has a kernel (all but rmsprop, on CPU and CUDA), else foreach.

    Its state is there from the start, zero as torch itself would make it at the first step, so that a checkpoint of
    step 0 has the names of any other and an update that is skipped on the device leaves nothing uninitialised.
    """
    optimizer = _construct(groups, optim, device)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = _fresh_state(parameter, optim, fused=bool(group.get("fused")))
    return optimizer


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
    state = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in names}
    if counts:  # fused kernels count on the device, the others on the host, where float32 counts to 2**24 exactly
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
    return state
