"""The optimizers of bitsandbytes: state in 8 bits (Dettmers et al. 2022, arXiv:2110.02861), and Lion and AdEMAMix.

A moment is kept as one byte a value with a float32 scale for each block of 256 values. Tensors of fewer values than
`optim.min_8bit_size` keep 32 bits.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.optim import Optimizer

from trainers.config import OptimConfig


def build_bitsandbytes(groups: list[dict[str, Any]], optim: OptimConfig, bits: int) -> Optimizer:
    """The bitsandbytes optimizer of this name with its state in `bits` (8 or 32), there from the start.

    Its count of steps is a tensor, so that it goes into a checkpoint with the rest.
    """
    optimizer = _construct(groups, optim, bits)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")  # said in the docs
        for g, group in enumerate(optimizer.param_groups):
            for p, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, g, p)  # type: ignore[attr-defined]
                optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.int64)
    return optimizer


def _construct(groups: list[dict[str, Any]], optim: OptimConfig, bits: int) -> Optimizer:
    from bitsandbytes.optim import AdamW, AdEMAMix, Lion
    from bitsandbytes.optim.optimizer import Optimizer1State

    common: dict[str, Any] = {
        "lr": optim.lr,
        "optim_bits": bits,
        "min_8bit_size": optim.min_8bit_size,
        "is_paged": optim.paged and bits == 8,
    }
    # bitsandbytes takes no (name, parameter) pairs
    plain = [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]
    if optim.name == "lion":
        return Lion(plain, betas=optim.betas, **common)
    if optim.name == "ademamix":
        betas = (*optim.betas, optim.beta3)
        return AdEMAMix(plain, betas=betas, alpha=optim.slow_weight, eps=optim.eps, **common)
    if optim.name == "sgd":  # SGD8bit itself takes no is_paged
        return Optimizer1State("momentum", plain, betas=(optim.momentum, 0.0), eps=0.0, **common)
    assert optim.name == "adamw", optim.name
    return AdamW(plain, betas=optim.betas, eps=optim.eps, **common)
