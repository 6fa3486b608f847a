"""Position schemes: what is added to the embeddings, or how queries and keys are rotated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

Rotation = Callable[[Tensor], Tensor]
"""turns (rows, T, 2, heads, head_width), queries and keys, by their positions"""


def unrotated(x: Tensor) -> Tensor:
    """x: what schemes that add positions to the embeddings do to queries and keys."""
    return x


class Sinusoidal(nn.Module):
    """Fixed sine and cosine vectors, one a position (Vaswani et al. 2017, section 3.5)."""

    weight: Tensor

    def __init__(self, context_length: int, width: int) -> None:
        super().__init__()
        # not persistent: a table that arithmetic gives back has no place in a checkpoint
        self.register_buffer("weight", torch.empty(context_length, width), persistent=False)
        self.fill()

    def fill(self) -> None:
        """Computes the table in float64 in place, except on the meta device; needed again after leaving it."""
        if self.weight.is_meta:
            return
        length, width = self.weight.shape
        pairs = (width + 1) // 2
        angles = _angles(length, torch.arange(pairs, dtype=torch.float64, device=self.weight.device) / pairs, 10_000.0)
        self.weight[:, 0::2] = angles.sin()
        self.weight[:, 1::2] = angles.cos()[:, : width // 2]


class Rotary(nn.Module):
    """Rotates pairs of query and key features by an angle that grows with the position (RoFormer, arXiv:2104.09864).

    Half-split pairs feature i with i + width/2; interleaved pairs feature 2i with 2i + 1.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, context_length: int, head_width: int, base: float, *, interleaved: bool) -> None:
        super().__init__()
        self.base = base
        self.interleaved = interleaved
        self.register_buffer("cos", torch.empty(context_length, head_width // 2), persistent=False)
        self.register_buffer("sin", torch.empty(context_length, head_width // 2), persistent=False)
        self.fill()

    def fill(self) -> None:
        """Computes both tables in float64 in place, except on the meta device; needed again after leaving it."""
        if self.cos.is_meta:
            return
        length, pairs = self.cos.shape
        exponents = torch.arange(pairs, dtype=torch.float64, device=self.cos.device) / pairs
        angles = _angles(length, exponents, self.base)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def first(self, length: int) -> Rotation:
        """The rotation of the first `length` positions."""
        return self._rotation(self.cos[:length, None, None], self.sin[:length, None, None])

    def at(self, positions: Tensor) -> Rotation:
        """The rotation at positions (rows, T)."""
        return self._rotation(self.cos[positions][:, :, None, None], self.sin[positions][:, :, None, None])

    def _rotation(self, cos: Tensor, sin: Tensor) -> Rotation:
        return partial(rotate_interleaved if self.interleaved else rotate_half_split, cos=cos, sin=sin)


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with the pairs (i, i + width/2) rotated; cos and sin broadcast against half of x."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with the pairs (2i, 2i + 1) rotated; cos and sin broadcast against half of x."""
    first, second = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def _angles(length: int, exponents: Tensor, base: float) -> Tensor:
    """position x base^-exponent, (length, pairs), float64."""
    positions = torch.arange(length, dtype=torch.float64, device=exponents.device)
    return torch.outer(positions, base**-exponents)
