"""How many bytes a value of training state takes, by the words of the configuration: the one table of it. No torch.

Weights are kept as the word of `precision` says, gradients as the weights that are trained, and the optimizer keeps
some values for each (`optimizer_values`). ZeRO spreads them over the workers: optimizer state from stage 1, gradients
from stage 2, weights at stage 3 (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trainers.config import OptimConfig, PrecisionConfig, RunConfig

State = Literal["weights", "gradients", "optimizer"]


@dataclass(frozen=True)
class Kept:
    """How the values of a tensor are stored."""

    value: float
    """bytes of each"""
    block: int = 0
    """values that share one scale; 0: there are no scales"""
    scale: int = 0
    """bytes of a scale"""
    nested: int = 0
    """scales that share one of 4 bytes; 0: nothing lies above the scales"""
    beside: int = 0
    """bytes of what each tensor has but once"""
    least: int = 0
    """tensors of fewer values stay in fp32"""

    def bytes(self, values: int) -> int:
        """Bytes of a tensor of so many values."""
        if values < self.least:
            return 4 * values
        scales = math.ceil(values / self.block) if self.block else 0
        above = 4 * math.ceil(scales / self.nested) if self.nested else 0
        return math.ceil(values * self.value) + scales * self.scale + above + self.beside


FP32, HALF = Kept(4), Kept(2)
BLOCKS_OF_8_BIT = Kept(1, block=256, scale=4)
"""bitsandbytes' 8-bit optimizers: blocks of 256 with an fp32 maximum"""
NF4_DOUBLE = Kept(0.5, block=64, scale=1, nested=256, beside=4 + 16 * 4)
"""nf4 with double quantisation: 64 values share an 8-bit scale, 256 of those another (arXiv:2305.14314, section 3);
beside them their mean and the sixteen values that the codes stand for"""


@dataclass(frozen=True)
class Words:
    """What a precision keeps."""

    weights: Kept = FP32
    gradients: Kept = FP32
    moments: Kept = FP32
    counter: int = 4
    """bytes of each tensor's count of steps, where the optimizer has one"""
    adapter_rank: int = 0
    """above 0, LoRA adapters alone are trained, over matrices that `weights` describes"""


WEIGHTS: dict[str, Kept] = {"native": FP32, "int8": FP32, "nf4": NF4_DOUBLE}
"""int8 is how products are computed: the master weights stay"""
MOMENTS: dict[str, Kept] = {"fp32": FP32, "int8": BLOCKS_OF_8_BIT}
BY_BITSANDBYTES = ("lion", "ademamix")


def words_of(precision: PrecisionConfig, optim: OptimConfig) -> Words:
    """What a configured precision keeps."""
    weights, moments = WEIGHTS[precision.weights], MOMENTS[precision.optimizer_state]
    bitsandbytes = precision.optimizer_state == "int8" or optim.name in BY_BITSANDBYTES
    trained = HALF if precision.bf16_weights else FP32
    return Words(
        weights=trained if precision.bf16_weights else weights,
        gradients=trained,
        moments=replace(moments, least=optim.min_8bit_size) if moments.block else moments,
        counter=8 if bitsandbytes else 4,
        adapter_rank=precision.adapter_rank,
    )


# ---- the optimizer ----------------------------------------------------------------------------------------------


def optimizer_values(optim: OptimConfig) -> int:
    """Values of optimizer state for each weight: moments, a velocity, or none."""
    match optim.name:
        case "adamw" | "adam":
            return 2
        case "ademamix":
            return 3
        case "lion":
            return 1
        case "sgd":
            return 1 if optim.momentum > 0 else 0
        case "rmsprop":
            return 2 if optim.momentum > 0 else 1


def counts_steps(optim: OptimConfig, words: Words) -> bool:
    """Whether each tensor has a count of steps besides; of torch's optimizers, sgd has none."""
    return optim.name != "sgd" or words.moments != FP32


def update_bytes(optim: OptimConfig, words: Words, tensors: Sequence[int]) -> int:
    """What lives during an update only, for trained tensors of so many values.

    Torch's foreach rmsprop makes a list of all roots; rounding to bf16 widens one tensor after another to fp32, with
    its gradient, its noise and its new bits.
    """
    listed = 4 * sum(tensors) if optim.name == "rmsprop" else 0
    return listed + (4 * 4 * max(tensors, default=0) if words.gradients == HALF else 0)


# ---- several workers --------------------------------------------------------------------------------------------

SPREAD_FROM: dict[State, int] = {"optimizer": 1, "gradients": 2, "weights": 3}
"""the ZeRO stage from which a worker holds only its part"""


@dataclass(frozen=True)
class Spread:
    """How several workers share a model's state."""

    stage: int
    """of ZeRO; FSDP2 shares out what stage 3 does"""
    workers: int
    half: bool = False
    """the working weights and gradients take 2 bytes"""
    master: bool = False
    """an fp32 copy of the weights lies with the optimizer state, and an update widens the gradients beside it"""
    adds_whole: bool = False
    """gradients of the micro-batches before a step's last are added up whole: FSDP2 without its reduction"""
    offloaded: tuple[State, ...] = ()
    """what waits in the host's memory"""

    @property
    def gathers(self) -> bool:
        """Weights lie in slices, and whoever computes with them first makes them whole."""
        return self.stage == SPREAD_FROM["weights"]

    def part(self, state: State, n_bytes: int) -> int:
        """What one worker's device holds of `n_bytes`."""
        return 0 if state in self.offloaded else self.share(state, n_bytes)

    def share(self, state: State, n_bytes: int) -> int:
        """What one worker holds of `n_bytes`, wherever it lies."""
        return math.ceil(n_bytes / self.workers) if self.stage >= SPREAD_FROM[state] else n_bytes

    def saved(self, n_bytes: int) -> int:
        """What a worker writes of a checkpoint of `n_bytes`, at most: FSDP2's their slices, else the first one all."""
        return math.ceil(n_bytes / self.workers) if self.adds_whole else n_bytes

    def words(self, words: Words) -> Words:
        """What it makes of a precision."""
        return replace(words, weights=HALF, gradients=HALF) if self.half else words


ALONE = Spread(stage=0, workers=1)
"""each worker holds everything"""


def spread_of(config: RunConfig, device: str) -> Spread:
    """How the engine of a run on `device` (cpu, cuda, mps) shares its state out.

    At stage 0 DeepSpeed leaves the weights in fp32 and updates them in place. On a CPU what is offloaded stays where it
    is: in the memory of the process.
    """
    if config.engine == "deepspeed":
        settings, stage = config.deepspeed, config.deepspeed.zero_stage
        offloaded: tuple[State, ...] = ("optimizer",) if settings.offload_optimizer else ()
        offloaded += ("weights",) if settings.offload_parameters else ()
        return Spread(
            stage,
            config.workers,
            half=stage > 0 and config.precision.compute != "fp32",
            master=stage > 0,
            offloaded=offloaded if device != "cpu" else (),
        )
    if config.parallel == "fsdp" and config.workers > 1:
        return Spread(3, config.workers, adds_whole=True)
    return Spread(0, config.workers)
