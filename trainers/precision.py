"""What a run computes in: autocast, and the loss scale that keeps fp16 gradients in range."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from trainers.config import PrecisionConfig
from trainers.errors import TrainingFailed

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: PrecisionConfig, device: torch.device) -> AbstractContextManager[Any]:
    """A context in which matrix products run in the configured type; the weights stay as they are (fp32)."""
    if precision.compute == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision.compute])


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2) that never waits for the device.

    The loss is multiplied by a scale so that small fp16 gradients do not vanish. An update whose gradients overflow
    is left out and halves the scale; `growth_interval` good updates in a row double it.
    """

    FLOOR = 1.0
    CEILING = 2.0**24

    def __init__(self, device: torch.device, *, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.growth_interval = growth_interval
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.good_updates = torch.tensor(0, dtype=torch.int32, device=device)
        """finite updates since the scale last changed"""
        self.overflows = torch.tensor(0, dtype=torch.int32, device=device)
        """updates left out because a gradient overflowed, over the whole run"""
        self.exhausted = torch.tensor(False, device=device)
        """an update overflowed although the scale stood at its floor"""

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return loss * self.scale

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide the gradients by the scale in place (exactly: the scale is a power of two)."""
        torch._foreach_mul_(gradients, self.scale.reciprocal())

    def update(self, overflowed: Tensor, *, counted: Tensor | bool = True) -> None:
        """Take in whether (bool scalar on the device) this update's gradients overflowed.

        An update that is not `counted` was left out for another reason, and says nothing about the scale.
        """
        self.exhausted = self.exhausted | (overflowed & (self.scale <= self.FLOOR))
        good = torch.where(overflowed, torch.zeros_like(self.good_updates), self.good_updates + counted)
        grow = good >= self.growth_interval
        factor = torch.where(overflowed, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale = (self.scale * factor).clamp(self.FLOOR, self.CEILING)
        self.good_updates = torch.where(grow, torch.zeros_like(good), good)
        self.overflows = self.overflows + overflowed

    def check(self) -> None:
        """Raise TrainingFailed when halving the scale no longer helps; waits for the device."""
        if bool(self.exhausted):
            raise TrainingFailed(
                f"fp16 gradients overflow even at the smallest loss scale ({self.FLOOR:g}, after "
                f"{int(self.overflows)} overflows): the loss diverges or the model leaves fp16's range (65,504). "
                f"Use precision.compute=bf16 or fp32, or lower optim.lr."
            )

    def state(self) -> dict[str, Any]:
        """JSON; waits for the device."""
        return {
            "scale": float(self.scale),
            "good_updates": int(self.good_updates),
            "overflows": int(self.overflows),
            "exhausted": bool(self.exhausted),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.scale.fill_(state["scale"])
        self.good_updates.fill_(state["good_updates"])
        self.overflows.fill_(state["overflows"])
        self.exhausted.fill_(state["exhausted"])
