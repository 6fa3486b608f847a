"""Linear layers that multiply in int8 over master weights of full precision, for training from scratch.

The forward product and the gradient of the input are products of int8 codes with int32 sums; the gradient of the
weight, which sums over all tokens and suffers most from rounding, stays in the compute type. This is SwitchBack
(Wortsman et al. 2023, arXiv:2304.13013, section 2.2), with a scale for each row of the weight instead of one for all.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 127
EXACT_TERMS = 1024  # terms of a sum of products of two codes that float32 holds exactly: 1024 x 127^2 < 2^24
MULTIPLE = 8  # the int8 kernels of CUDA take widths that are multiples of it
LEAST_ROWS = 17  # and more rows than 16


class Int8Linear(nn.Linear):
    """nn.Linear whose products are int8; parameters, names and updates are those of nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in autocast's type where that is on, else in the input's."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        with torch.autocast(kind, enabled=False):
            out = cast(Tensor, _Int8Product.apply(input.to(dtype), self.weight))
            return out if self.bias is None else out + self.bias.to(dtype)


def use_int8(model: nn.Module) -> list[str]:
    """Turn the linear layers of `model` into int8 ones in place, and return their names.

    Kept as they are: the output layer (`head`), whose errors go straight into the loss, and layers whose widths are
    no multiples of 8.
    """
    turned = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.rsplit(".", 1)[-1] != "head" and _fits(module):
            module.__class__ = Int8Linear
            turned.append(name)
    return turned


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def quantise_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of `values` (rows, width) and each row's scale (rows, 1): values = codes x scale within scale / 2."""
    scale = values.abs().amax(dim=1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
    return (values.float() / scale).round_().to(torch.int8), scale


def int8_product(left: Tensor, right: Tensor) -> Tensor:
    """left (M, K) int8 times right (N, K) int8 transposed: float32 (M, N).

    The sums are integers and exact, so they do not depend on their order, on the threads or on the device. CUDA has
    kernels for it. A CPU multiplies the codes in float32, in pieces of the sum that float32 holds exactly: torch's
    own int8 product for CPUs takes some 30 times as long.
    """
    if left.is_cuda:
        missing = max(0, LEAST_ROWS - left.shape[0])
        padded = F.pad(left, (0, 0, 0, missing)) if missing else left
        return torch._int_mm(padded, right.t())[: left.shape[0]].float()
    width = left.shape[1]
    wide = torch.float32 if width <= EXACT_TERMS else torch.float64
    total = torch.zeros((left.shape[0], right.shape[0]), dtype=wide, device=left.device)
    for start in range(0, width, EXACT_TERMS):
        piece = slice(start, start + EXACT_TERMS)
        total += left[:, piece].float() @ right[:, piece].float().t()
    return total.float()


class _Int8Product(torch.autograd.Function):
    """input (..., K) in the compute type times weight (N, K) transposed, by codes."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        codes, scale = quantise_rows(rows)
        weight_codes, weight_scale = quantise_rows(weight)
        out = int8_product(codes, weight_codes).mul_(scale).mul_(weight_scale.t())
        ctx.save_for_backward(rows, weight_codes, weight_scale)
        ctx.weight_dtype = weight.dtype
        return out.to(input.dtype).view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight_codes, weight_scale = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        input_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:  # the weight's scales go into the gradient: the sum runs over the weight's rows
            codes, scale = quantise_rows(flat * weight_scale.t())
            product = int8_product(codes, weight_codes.t()).mul_(scale)
            input_gradient = product.to(gradient.dtype).view(*gradient.shape[:-1], rows.shape[1])
        if ctx.needs_input_grad[1]:
            weight_gradient = (flat.t() @ rows).to(ctx.weight_dtype)
        return input_gradient, weight_gradient
