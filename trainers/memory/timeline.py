"""What training allocates, moment by moment, read off a small build whose tensors have no memory.

A model of the real width, sequence length and vocabulary but at most three layers runs one step under ShapesOnly:
every operation of forward and backward happens, with the shapes, types and kernels of the CPU, and none of the memory.
After each operation the living bytes are written down by what they are for.

Layers are alike, so one layer more adds the same at each moment. Rows are alike too, and their number is a prime that
divides no other dimension, so a tensor is either in proportion to the rows or does not depend on them. `Timeline` so
knows every depth and every number of rows. tests/trainers/memory holds both laws against runs at full depth and
against hooks on real tensors.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock
from typing import cast

import numpy as np

from trainers.config import ModelConfig, PrecisionConfig
from trainers.memory.phase_key import DEPTH
from trainers.memory.recorder import GRADIENTS, Place, Trace
from trainers.memory.shapes_only import ShapesOnly
from trainers.memory.small_build import Kernels, SmallBuild, cuda_kernels, without_collection
from trainers.memory.without_compiler import without_compiler
from trainers.objectives import Objective

ONE_AT_A_TIME = Lock()  # names of modules are exchanged meanwhile
PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069, 1087, 1091, 1093, 1097)


@dataclass(frozen=True)
class Moments:
    """One pass at every number of rows and layers."""

    fixed: np.ndarray
    """(moments, kinds): bytes that do not depend on the rows, in the small build"""
    a_row: np.ndarray
    """(moments, kinds): bytes for each row"""
    slopes: np.ndarray
    """(slopes, moments, kinds, 2): what a further layer adds at most, fixed and a row; either end of the depth"""

    def at(self, rows: int, more_layers: int) -> np.ndarray:
        """(moments, kinds): living bytes with `more_layers` beyond the small build; the heavier end at each moment."""
        base = self.fixed + self.a_row * rows
        further = self.slopes[..., 0] + self.slopes[..., 1] * rows
        ends = base + more_layers * further
        heavier = ends.sum(-1).argmax(0)
        return cast(np.ndarray, ends[heavier, np.arange(len(base))])


@dataclass(frozen=True)
class Timeline:
    """Memory of one micro-batch and of one evaluated batch, for every number of rows and of layers."""

    layers: int
    """of the small build"""
    first: Moments
    """the first micro-batch of a step: gradients come into being"""
    later: Moments
    """a later one: gradients are there"""
    scoring: Moments
    """an evaluated batch: nothing is kept"""
    saved: np.ndarray
    """(2, 2): bytes that saved-tensor hooks saw: of all but the layers, of one layer; fixed and a row"""

    def peak(self, rows: int, layers: int, *, accumulates: bool) -> np.ndarray:
        """(kinds,): living bytes at the heaviest moment of a micro-batch of `rows` rows."""
        return _heaviest((self.later if accumulates else self.first).at(rows, layers - self.layers))

    def scoring_peak(self, rows: int, layers: int) -> np.ndarray:
        """(kinds,): living bytes at the heaviest moment of an evaluated batch."""
        return _heaviest(self.scoring.at(rows, layers - self.layers))

    def saved_bytes(self, rows: int, layers: int) -> int:
        """What the forward pass keeps for the backward pass, weights aside."""
        outside, a_layer = self.saved[:, 0] + self.saved[:, 1] * rows
        return round(float(outside + layers * a_layer))


def _heaviest(moments: np.ndarray) -> np.ndarray:
    return cast(np.ndarray, moments[moments.sum(1).argmax()])


def read_timeline(
    config: ModelConfig,
    vocab_size: int,
    *,
    sequence_length: int,
    precision: PrecisionConfig,
    objective: Objective,
    kernels: Kernels = "cpu",
    depth: int = DEPTH,
) -> Timeline:
    """The Timeline of a model, without allocating it. Takes a quarter of a second, and no more for larger models.

    `depth`: layers of the small build.
    """
    depth = min(depth, config.n_layers)
    small = config.model_copy(update={"n_layers": depth})
    rows = rows_to_tell_apart(small, vocab_size, sequence_length)
    with ONE_AT_A_TIME, without_compiler(), ShapesOnly(), without_collection(), ExitStack() as stack:
        if kernels == "cuda":
            stack.enter_context(cuda_kernels())
        build = SmallBuild(small, vocab_size, sequence_length, precision, objective)
        found = build.passes(rows)
    first, later, scoring = (_moments(trace, depth) for trace in found.traces)
    later = _with_standing_gradients(later, build.layer_gradients)
    return Timeline(depth, first, later, scoring, found.saved)


def rows_to_tell_apart(config: ModelConfig, vocab_size: int, sequence_length: int) -> int:
    """A number of rows that no other dimension of a tensor is a multiple of."""
    others = (vocab_size, sequence_length, config.d_model, config.n_heads, config.ffn_width, config.context_length)
    return next(prime for prime in PRIMES if all(other % prime for other in others))


def _moments(trace: Trace, depth: int) -> Moments:
    slopes = np.zeros((2, *trace.living.shape))
    if depth >= DEPTH:
        up, through = trace.growth()
        known = {where: _slopes(*where, up, through) for where in set(trace.places)}
        for moment, where in enumerate(trace.places):
            slopes[:, moment] = known[where]
    return Moments(trace.living[..., 0], trace.living[..., 1], slopes)


def _slopes(place: Place, backward: bool, up: np.ndarray, through: np.ndarray) -> np.ndarray:
    """What a further layer in the middle adds at a moment: at the near end of the depth and at the far one.

    up: what a layer's forward leaves; through: what is left of it when its backward is over.
    """
    nothing = np.zeros_like(up)
    if not backward:
        return np.stack({"below": (nothing, nothing), "first": (nothing, nothing), "middle": (nothing, up)}.get(
            place, (up, up)
        ))  # fmt: skip
    return np.stack({"above": (up, up), "last": (up, up), "middle": (up, through)}.get(place, (through, through)))


def _with_standing_gradients(moments: Moments, layer_gradients: int) -> Moments:
    """A later micro-batch begins with the gradients of every layer."""
    slopes = moments.slopes.copy()
    slopes[:, :, GRADIENTS, 0] += layer_gradients
    return Moments(moments.fixed, moments.a_row, slopes)
