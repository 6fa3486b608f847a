"""Training with bf16 weights alone: updates are computed in fp32 and rounded stochastically.

bf16 keeps 8 bits: an update below 1/512 of its weight would be lost by rounding to the nearest. Rounded up with the
probability that it deserves, it is kept on average (Zamirai et al. 2020, arXiv:2010.06192).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from trainers.seeds import stream_seed

ROUNDS = "rounds"
"""the name, in the state of the first parameter, of the count of updates that were rounded"""

UpdateOne = Callable[[dict[str, Any], Tensor, Tensor, Tensor], None]
"""(group, parameter, its values in fp32, its gradient in fp32): updates the values in place"""


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """`values` (float32) as bfloat16: each one of its two neighbours, with its own value for expectation.

    What bf16 can hold stays as it is.
    """
    noise = torch.empty_like(values, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
    bits = (values.view(torch.int32) + noise) & -(1 << 16)
    return bits.view(torch.float32).bfloat16()


class RoundedUpdates(Optimizer):
    """`inner` over bf16 parameters: one parameter after another is widened, updated and rounded.

    The noise is a function of the count of updates, which is part of the state: alike on every rank, and a run that
    goes on draws what it would have drawn.
    """

    def __init__(self, inner: Optimizer, update_one: UpdateOne):
        super().__init__(inner.param_groups, inner.defaults)
        self.state = inner.state
        self._update_one = update_one
        first = self.param_groups[0]["params"][0]
        self.state[first][ROUNDS] = self._rounds = torch.zeros((), dtype=torch.int64)
        self._generator = torch.Generator(device=first.device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        self._generator.manual_seed(stream_seed(0, "rounding", int(self._rounds)))
        self._rounds += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                values = parameter.float()
                self._update_one(group, parameter, values, parameter.grad.float())
                parameter.copy_(round_stochastically(values, self._generator))


def rounded_adamw(inner: Optimizer) -> RoundedUpdates:
    """Torch's AdamW with moments in fp32. Where `found_inf` is 1 all stays as it is, as with the fused kernels."""

    def update_one(group: dict[str, Any], parameter: Tensor, values: Tensor, gradient: Tensor) -> None:
        state = inner.state[parameter]
        beta1, beta2 = group["betas"]
        adamw(
            [values], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            fused=True, found_inf=getattr(rounded, "found_inf", None), amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip

    rounded = RoundedUpdates(inner, update_one)
    return rounded


def rounded_bitsandbytes(inner: Optimizer) -> RoundedUpdates:
    """An optimizer of bitsandbytes, which finds a parameter's state by the parameter."""
    places = {
        id(parameter): (g, p)
        for g, group in enumerate(inner.param_groups)
        for p, parameter in enumerate(group["params"])
    }

    def update_one(group: dict[str, Any], parameter: Tensor, values: Tensor, gradient: Tensor) -> None:
        values.grad = gradient
        inner.state[values] = inner.state[parameter]
        inner.update_step(group, values, *places[id(parameter)])  # type: ignore[attr-defined]
        del inner.state[values]

    return RoundedUpdates(inner, update_one)
