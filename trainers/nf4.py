"""Linear layers whose frozen weights are kept in 4 bits: NF4 with double quantisation (Dettmers et al. 2023,
arXiv:2305.14314, section 3).

Half a byte a value, a byte of scale for each 64 values and a float32 scale for each 256 of those scales: 0.516 bytes a
value. Products widen the weights again; gradients go through to the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

BLOCK = 64  # values that share a scale


class Nf4Linear(nn.Linear):
    """nn.Linear over 4-bit weights, which `dequantised` gives back; the bias stays as it is. Nothing in it is trained.

    Not bitsandbytes' own Linear4bit: on CPUs with AVX512-BF16 that repacks its weights at the first evaluation and
    then cannot train on, and it rounds the bias in place.
    """

    def __init__(self, source: nn.Linear) -> None:
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import quantize_4bit

        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        packed, self.quant_state = quantize_4bit(
            source.weight.detach().float().contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = source.bias
        self._matmul = matmul_4bit

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in autocast's type where that is on, else in the input's."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        with torch.autocast(kind, enabled=False):
            out = cast(Tensor, self._matmul(input.to(dtype), self.weight, quant_state=self.quant_state))
            return out if self.bias is None else out + self.bias.to(dtype)

    def dequantised(self) -> Tensor:
        """The weights as they count: float32 (out_features, in_features)."""
        from bitsandbytes.functional import dequantize_4bit

        return cast(Tensor, dequantize_4bit(self.weight, self.quant_state))

    def scales(self) -> dict[str, Tensor]:
        """What it keeps besides the codes, by name."""
        state = self.quant_state
        return {"absmax": state.absmax, "nested_absmax": state.state2.absmax, "offset": state.offset}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.quant_state.to(self.weight.device)
        return self


def quantise(model: nn.Module, names: list[str]) -> None:
    """Put 4-bit layers in the places of the named linear layers of `model`."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), leaf, Nf4Linear(layer))
