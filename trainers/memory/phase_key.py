"""What a timeline depends on: phases with the same shapes share one. No torch."""

from __future__ import annotations

from typing import Any

from trainers.config import Phase, RunConfig

DEPTH = 3
"""layers of a small build: the first, one like all in the middle, the last"""


def phase_key(config: RunConfig, phase: Phase) -> tuple[Any, ...]:
    """Equal where timelines are, but for the vocabulary and the device.

    fp16 and bf16 have the same shapes, a 4-bit base computes in those of a plain one, and greater depth is calculated.
    """
    precision = config.precision
    compute = "half" if precision.compute != "fp32" else "fp32"
    weights = "native" if precision.weights == "nf4" else precision.weights
    model = phase.model.model_copy(update={"n_layers": min(phase.model.n_layers, DEPTH)})
    smoothed = phase.optim.label_smoothing > 0
    return compute, weights, precision.adapter_rank, precision.bf16_weights, config.sequence_length, model, smoothed
