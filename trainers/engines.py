"""Engine: what the loop asks of whoever takes the steps, and the one that a configuration means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainers.config import OptimConfig, PrecisionConfig, RunConfig
from trainers.engine import NamedTensors, TorchEngine
from trainers.incidents import SkippedUpdates, Update


class Engine(Protocol):
    """The seam; what each method does stands at TorchEngine. Every rank calls every method alike.

    `tensors`, `state` and `load` speak of whole named tensors, and a reader gets them of what `saved` gave, so what one
    engine saved any other goes on from.
    """

    module: nn.Module
    """the model as it was handed over, perhaps without weights: `whole` is the one to call outside of a step"""
    precision: PrecisionConfig
    optimizer: torch.optim.Optimizer
    scaler: Any
    """of the loss; None but under fp16"""
    skipped: SkippedUpdates
    decides_on_device: bool

    def micro_batch(self, *, last: bool) -> AbstractContextManager[nn.Module]: ...
    def normalise(self, total: Tensor, step_targets: int) -> Tensor: ...
    def backward(self, loss: Tensor) -> None: ...
    def update(self, lr: float) -> Update: ...
    def gradients(self) -> Iterator[Tensor]: ...
    def masters(self) -> Iterator[Tensor]: ...
    def whole(self) -> AbstractContextManager[nn.Module]: ...
    def tensors(self) -> dict[str, NamedTensors]: ...
    def saved(self) -> dict[str, NamedTensors]: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, files: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], *, optimizer: bool) -> None: ...
    def begin_phase(self, optim: OptimConfig, *, keep_optimizer: bool) -> None: ...
    def close(self) -> None: ...


def engine_name(config: RunConfig) -> str:
    """What decides in which order the workers' gradients are added."""
    if config.engine == "deepspeed":
        return f"deepspeed, ZeRO {config.deepspeed.zero_stage}"
    return "torch, FSDP2" if config.parallel == "fsdp" and config.workers > 1 else "torch"


def build_engine(config: RunConfig, model: nn.Module, device: torch.device, world_size: int) -> Engine:
    """The engine that `config` names around `model`, which lies on `device`, with the settings of the first phase.

    A collective. Raises ConfigError where the engine cannot work here.
    """
    optim = config.resolved_phases()[0].optim
    if config.engine == "deepspeed":
        from trainers.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, config=config, optim=optim, device=device, world_size=world_size)
    return TorchEngine(
        model,
        optim=optim,
        precision=config.precision,
        device=device,
        world_size=world_size,
        compile=config.compile,
        deterministic=config.deterministic,
        sharded=config.parallel == "fsdp",
    )
