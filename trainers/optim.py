"""Learning rates, weight-decay groups and optimizers, as pure functions of the configuration."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from trainers.config import OptimConfig, ScheduleConfig
from trainers.errors import ConfigError

# ---- schedules ---------------------------------------------------------------------------------------


def lr_at(
    schedule: ScheduleConfig, step: int, *, total_steps: int, base_lr: float, steps_per_epoch: int | None
) -> float:
    """The learning rate of update number `step` (counted from 0) of a phase of `total_steps` updates.

    Warm-up of w updates: update number s takes (s + 1) / w of the rate, so that the k-th update made (k = s + 1)
    has k / w, none has 0, and the last of the warm-up has the full rate. The shape then starts at the full rate with
    update w and, for linear, cosine and wsd, ends at `min_lr_ratio` of it with update total_steps - 1; beyond that
    it stays there. ConfigError when epochs are asked of a corpus whose length nobody knows (`steps_per_epoch` None).
    """
    if step < schedule.warmup_steps:
        return base_lr * (step + 1) / schedule.warmup_steps
    return base_lr * _shape(schedule, step, total_steps, steps_per_epoch)


def _shape(schedule: ScheduleConfig, step: int, total_steps: int, steps_per_epoch: int | None) -> float:
    since = step - schedule.warmup_steps  # 0 at the first update after the warm-up
    floor = schedule.min_lr_ratio
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "inverse_sqrt":  # Vaswani et al. 2017, section 5.3
        reference = max(1, schedule.warmup_steps)
        return math.sqrt(reference / (reference + since))
    if schedule.kind == "step":
        return max(floor, schedule.gamma ** math.floor(since / _interval(schedule, steps_per_epoch) + 1e-9))
    if schedule.kind == "wsd":  # warm-up, stable, decay: Hu et al. 2024 (MiniCPM)
        start = max(schedule.warmup_steps, total_steps - max(1, round(schedule.decay_fraction * total_steps)))
        progress = (step - start + 1) / max(1, total_steps - start)
        return 1.0 - (1.0 - floor) * min(1.0, max(0.0, progress))
    progress = min(1.0, since / max(1, total_steps - schedule.warmup_steps - 1))
    if schedule.kind == "linear":
        return 1.0 - (1.0 - floor) * progress
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _interval(schedule: ScheduleConfig, steps_per_epoch: int | None) -> float:
    if schedule.step_unit == "steps":
        return schedule.step_size
    if steps_per_epoch is None:
        raise ConfigError(
            f"schedule.kind=step with step_size={schedule.step_size:g} epochs needs a corpus of known length, and a "
            f"streaming one has none: set schedule.step_unit=steps and schedule.step_size to a number of steps."
        )
    return schedule.step_size * steps_per_epoch


def budget_can_grow(schedule: ScheduleConfig) -> tuple[bool, str]:
    """Whether a run under `schedule` may get a larger budget, and the reason to show where it may not.

    It may when the rates of the steps already taken do not depend on the total.
    """
    if schedule.kind in ("constant", "inverse_sqrt", "step"):
        return True, ""
    ends = "starts its decay so many steps before the end" if schedule.kind == "wsd" else "reaches its floor at the end"
    return False, (
        f"schedule.kind={schedule.kind} {ends} of the budget, so a larger budget would have given the steps already "
        f"taken another learning rate. Start a new run with the larger budget (or from these weights with "
        f"--init-from), or use schedule.kind=constant, step or inverse_sqrt, whose curve does not depend on it."
    )


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
