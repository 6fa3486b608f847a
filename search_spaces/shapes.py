"""Shapes of a model (layers x width) with about as many parameters as the configured one."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from trainers.config import ModelConfig

BAND = 0.10
"""how far a shape's block parameters may be from the configured model's, as a share of them"""
DEPTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""depths to try, as multiples of the configured one"""

_SPELLED = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,6})")


class Shape(NamedTuple):
    """Depth and width of a decoder; written `12x768`."""

    n_layers: int
    d_model: int

    def __str__(self) -> str:
        return f"{self.n_layers}x{self.d_model}"


def parse_shape(text: object) -> Shape | None:
    """The shape that `12x768` means; None for anything else."""
    found = _SPELLED.fullmatch(text) if isinstance(text, str) else None
    return Shape(int(found[1]), int(found[2])) if found else None


def ffn_width(model: ModelConfig, d_model: int) -> int | None:
    """The `model.d_ff` that keeps the configured ratio to the width at `d_model`; None stays None (4 times)."""
    return None if model.d_ff is None else max(1, round(model.d_ff / model.d_model * d_model))


def block_parameters(model: ModelConfig, shape: Shape) -> int:
    """Weights of the attention and feed-forward matrices of all blocks: the model without embeddings and norms.

    These are the parameters that depth and width trade against each other (Kaplan et al. 2020, table 1: N).
    """
    n_layers, d_model = shape
    width = ffn_width(model, d_model) or 4 * d_model
    matrices = 3 if model.activation == "swiglu" else 2
    return n_layers * (4 * d_model**2 + matrices * d_model * width)


def equal_shapes(model: ModelConfig) -> tuple[Shape, ...]:
    """Shapes from a quarter to four times the depth whose block parameters stay within BAND of the model's.

    Widths are multiples of the heads (and keep a head's width even under rotary positions). The model's own shape is
    among them; deeper ones come later.
    """
    own = Shape(model.n_layers, model.d_model)
    unit = model.n_heads * (2 if model.positions.startswith("rope") else 1)
    depths = sorted({max(1, round(own.n_layers * times)) for times in DEPTHS})
    shapes = [own if depth == own.n_layers else _fitted(own, depth, unit) for depth in depths if depth <= 1000]
    total = block_parameters(model, own)
    return tuple(shape for shape in shapes if abs(block_parameters(model, shape) - total) <= BAND * total)


def _fitted(own: Shape, n_layers: int, unit: int) -> Shape:
    """The width, a multiple of `unit`, that keeps layers x width^2 nearest to the model's own."""
    width = own.d_model * math.sqrt(own.n_layers / n_layers)
    return Shape(n_layers, max(1, round(width / unit)) * unit)
