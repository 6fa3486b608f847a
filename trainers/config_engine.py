"""The engine: who takes the steps, and how several workers share a model's tensors.

None of this changes what is computed beyond the order of sums (and the masks of dropout), so checkpoints do not depend
on it: `--reshape` goes on under another engine, another ZeRO stage and with another number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from trainers.config_fields import Frozen
from trainers.config_training import OptimConfig

if TYPE_CHECKING:
    from trainers.config import RunConfig

EngineName = Literal["torch", "deepspeed"]
ParallelName = Literal["ddp", "fsdp"]
BY_BITSANDBYTES = ("lion", "ademamix")
"""optimizers whose state is laid out in a way of its own"""


class DeepSpeedConfig(Frozen):
    """ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): what each worker keeps 1/workers of; engine=deepspeed."""

    zero_stage: Literal[0, 1, 2, 3] = 2  # 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too
    offload_optimizer: bool = False  # optimizer state and update on the CPU
    offload_parameters: bool = False  # weights wait on the CPU until they are used; stage 3
    config: str | None = None  # a ds_config.json: what it tunes; what it contradicts is refused


def engine_conflicts(config: RunConfig) -> list[str]:
    """What does not go together with the engine, a sentence each with the way out; empty where all of it does."""
    if config.engine == "deepspeed":
        return list(dict.fromkeys(_deepspeed(config)))
    found = []
    if config.deepspeed != DeepSpeedConfig():
        set_there = [name for name, value in config.deepspeed if value != getattr(DeepSpeedConfig(), name)]
        found.append(
            f"{', '.join(f'deepspeed.{name}' for name in set_there)} would do nothing under engine={config.engine}: "
            "set engine=deepspeed, or leave it out."
        )
    if config.parallel == "fsdp":
        found += dict.fromkeys(_fsdp(config))
    return found


def _optims(config: RunConfig) -> Sequence[OptimConfig]:
    return [phase.optim for phase in config.resolved_phases()]


def _fsdp(config: RunConfig) -> Iterator[str]:
    way_out = "or parallel=ddp"
    if config.precision.optimizer_state == "int8":
        yield (
            "precision.optimizer_state=int8 with parallel=fsdp: bitsandbytes quantises blocks of whole tensors, and "
            f"FSDP2 gives each worker a slice. Set precision.optimizer_state=fp32, {way_out}."
        )
    for name in sorted({optim.name for optim in _optims(config)} & set(BY_BITSANDBYTES)):
        yield f"optim.name={name} with parallel=fsdp: bitsandbytes' kernels take no slices. Set adamw, {way_out}."
    if config.precision.weights != "native":
        yield (
            f"precision.weights={config.precision.weights} with parallel=fsdp: quantised weights are packed whole, and "
            f"FSDP2 shares out slices. Set precision.weights=native, {way_out}."
        )
    if config.precision.adapter_rank:
        yield f"precision.adapter_rank with parallel=fsdp: adapters are too small to share out. Use {way_out[3:]}."
    if config.precision.bf16_weights:
        yield (
            "precision.bf16_weights with parallel=fsdp: the random numbers that round an update are drawn for whole "
            f"tensors. Set precision.bf16_weights=false, {way_out}."
        )
    if config.device == "mps":
        yield f"parallel=fsdp needs several CUDA GPUs or CPU workers, not device=mps: {way_out[3:]}."


def _deepspeed(config: RunConfig) -> Iterator[str]:
    settings, precision, way_out = config.deepspeed, config.precision, "or engine=torch"
    if config.parallel == "fsdp":
        yield "parallel=fsdp is an option of engine=torch, and ZeRO does its work under engine=deepspeed: leave it out."
    if settings.offload_parameters and settings.zero_stage != 3:
        yield f"deepspeed.offload_parameters needs deepspeed.zero_stage=3, not {settings.zero_stage}."
    if settings.offload_optimizer and settings.zero_stage == 0:
        yield "deepspeed.offload_optimizer needs deepspeed.zero_stage=1, 2 or 3, not 0."
    if precision.weights != "native":
        yield (
            f"precision.weights={precision.weights} with engine=deepspeed (zero_stage={settings.zero_stage}): ZeRO "
            f"cuts float weights into slices, and quantised ones are packed whole. Set precision.weights=native, "
            f"{way_out}."
        )
    if precision.adapter_rank:
        yield f"precision.adapter_rank with engine=deepspeed: adapters are too small to share out. Use {way_out[3:]}."
    if precision.optimizer_state == "int8":
        yield (
            "precision.optimizer_state=int8 with engine=deepspeed: its accessors give 32-bit state, so 8-bit state "
            f"could not be saved. Set precision.optimizer_state=fp32, {way_out}."
        )
    if precision.bf16_weights:
        yield (
            "precision.bf16_weights with engine=deepspeed: under compute=bf16 ZeRO keeps bf16 weights beside fp32 "
            f"master weights by itself. Leave it out, {way_out}."
        )
    if config.compile and settings.zero_stage == 3:
        yield (
            "compile=true with deepspeed.zero_stage=3: ZeRO-3 gathers the weights in hooks around every module, which "
            "torch.compile cannot trace. Set compile=false, deepspeed.zero_stage=2, or engine=torch parallel=fsdp."
        )
    if config.device == "mps":
        yield f"engine=deepspeed is not supported on device=mps: set device=cpu, {way_out}."
    yield from _one_optimizer(config)


def _one_optimizer(config: RunConfig) -> Iterator[str]:
    optims = _optims(config)
    for name in sorted({optim.name for optim in optims} & set(BY_BITSANDBYTES)):
        yield f"optim.name={name} with engine=deepspeed: its state cannot be read back. Set adamw, or engine=torch."
    kinds = {(optim.name, bool(optim.momentum), optim.decay, optim.weight_decay > 0) for optim in optims}
    if len(kinds) > 1:
        yield (
            "engine=deepspeed lays out its optimizer once: optim.name and optim.decay, and whether optim.momentum and "
            "optim.weight_decay are 0, must be the same in every phase. Make them equal, or set engine=torch."
        )
