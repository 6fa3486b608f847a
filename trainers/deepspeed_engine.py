"""DeepSpeedEngine: the steps of TorchEngine with gradients, optimizer state and weights shared out by ZeRO.

DeepSpeed keeps its state in flat slices of groups of tensors, cut by the number of workers. It is read and written
tensor by tensor through DeepSpeed's accessors, so a checkpoint is the same as that of any other engine; the pickles
that DeepSpeed would write are neither written nor read.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.config import OptimConfig, PrecisionConfig, RunConfig
from trainers.deepspeed_config import ds_config
from trainers.deepspeed_state import ZeroState
from trainers.devices import set_determinism
from trainers.engine import NamedTensors, rank_part, same_optimizer
from trainers.errors import ConfigError, TrainingFailed
from trainers.incidents import SkippedUpdates, Update
from trainers.optim import build_optimizer, parameter_groups
from trainers.precision import LossScaler, autocast
from trainers.replica import Replica

EXHAUSTED = "already at minimum"  # what DeepSpeed's loss scaler says when halving no longer helps


class DeepSpeedEngine:
    """A model and its optimizer under DeepSpeed; used as TorchEngine is, and every method is called by every rank.

    Stage 0 keeps everything on every worker: clipping, the loss scale and the non-finite policy are those of
    TorchEngine. From stage 1 on DeepSpeed clips and, where the gradient's norm is not finite on any rank, leaves out
    the update on all of them; a loss that is not finite is made to reach the gradients.
    """

    decides_on_device = False

    def __init__(
        self, model: nn.Module, *, config: RunConfig, optim: OptimConfig, device: torch.device, world_size: int
    ) -> None:
        deepspeed = _deepspeed(device, world_size)
        set_determinism(config.deterministic)
        self.module = model
        self.device = device
        self.world_size = world_size
        self.precision = config.precision
        self.stage: int = config.deepspeed.zero_stage
        self._optim = optim
        self._named = list(model.named_parameters())
        shapes = {name: parameter.shape for name, parameter in self._named}  # at stage 3 they are soon empty
        self._replica = Replica(model)
        self.optimizer, kinds = _optimizer(model, optim, device, config.precision)
        """the torch optimizer inside"""
        if config.compile:
            model.compile()
        self._ds: Any = deepspeed.initialize(
            model=_InAutocast(model, config.precision, device),
            optimizer=self.optimizer,
            config=ds_config(config, optim),
            dist_init_required=False,
        )[0]
        self._kept = ZeroState(model, self._ds, self.optimizer, kinds, shapes, self.stage)
        self.scaler: Any = None
        """of the loss, where there is one"""
        if config.precision.compute == "fp16":
            self.scaler = ZeroScaler(self._ds.optimizer) if self.stage else LossScaler(device)
        self.skipped = SkippedUpdates(device, self.scaler, world_size=world_size)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self._ds.destroy()

    # ---- a step ---------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[nn.Module]:
        """The module to call for one forward; the update follows the `last`."""
        self._ds.set_gradient_accumulation_boundary(last)
        with autocast(self.precision, self.device):  # for the loss: DeepSpeed turns it off around the model
            yield self._ds

    def normalise(self, total: Tensor, step_targets: int) -> Tensor:
        """This rank's part of the step's mean loss per target, times the ranks over which DeepSpeed takes the mean."""
        return rank_part(total, step_targets, self.world_size)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; to be called inside micro_batch. A non-finite loss makes them NaN."""
        self.skipped.see(loss)
        seed = loss.detach() * 0.0 + 1.0  # 1, or NaN for a loss that is not finite
        if isinstance(self.scaler, LossScaler):
            seed = seed * self.scaler.scale
        with torch.autocast(self.device.type, enabled=False):
            self._ds.backward(loss * seed, scale_wrt_gas=False)

    def update(self, lr: float) -> Update:
        """Clip and apply the accumulated gradients at rate `lr`, then clear them."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return self._sliced_update() if self.stage else self._whole_update()

    def _sliced_update(self) -> Update:
        try:
            self._ds.step()
        except Exception as error:  # DeepSpeed has no type of its own for it
            if EXHAUSTED not in str(error):
                raise
            raise TrainingFailed(
                f"fp16 gradients overflow even at the smallest loss scale: the loss diverges or the model leaves "
                f"fp16's range (65,504). Use precision.compute=bf16 or fp32, or lower optim.lr. ({error})"
            ) from error
        skipped = bool(self._ds.optimizer.overflow)
        norm = torch.as_tensor(self._ds.get_global_grad_norm(), dtype=torch.float32)
        self.skipped.count(torch.tensor(skipped, device=self.device))
        return Update(norm, skipped)

    def _whole_update(self) -> Update:
        parameters = [parameter for _, parameter in self._named if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale(gradients)
        if self._optim.clip_norm is None:
            norm = torch.nn.utils.get_total_norm(gradients)
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self._optim.clip_norm)
        skipped = not bool(torch.isfinite(norm))
        if skipped:
            self._ds.zero_grad()
        else:
            self._ds.step()
        self.skipped.count(torch.tensor(skipped, device=self.device))
        return Update(norm, skipped)

    # ---- state ----------------------------------------------------------------------------------

    def gradients(self) -> Iterator[Tensor]:
        """As TorchEngine.gradients; from stage 1 on DeepSpeed keeps them in places of its own."""
        return self._kept.gradients()

    def masters(self) -> Iterator[Tensor]:
        """This rank's fp32 slices, but those that are the very weights that the model computes with."""
        return self._kept.masters()

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """A plain module with all weights (the working copies) on this rank, for any use; a collective to enter."""
        with self._replica.lent(self._kept.weights()) as module:
            yield module

    def tensors(self) -> dict[str, NamedTensors]:
        """As TorchEngine.tensors, in fp32 and whole, on rank 0; nothing on the others. A collective."""
        return self._kept.tensors()

    def saved(self) -> dict[str, NamedTensors]:
        """All of it: what ZeRO has in slices is read through its own accessors, which give whole tensors."""
        return self.tensors()

    def state(self) -> dict[str, Any]:
        """JSON: what continues besides the tensors."""
        return self.skipped.state()

    def load(self, files: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], *, optimizer: bool) -> None:
        """Take over `files` and `state` of any engine, whole on every rank; only the weights unless `optimizer`.

        Raises CheckpointError, naming the tensors, where names, shapes or types differ; then nothing was changed.
        """
        self._kept.check(files, optimizer=optimizer)
        if optimizer:
            self.skipped.load(state)
        self._kept.put(files, optimizer=optimizer)
        self._ds.zero_grad()

    def begin_phase(self, optim: OptimConfig, *, keep_optimizer: bool) -> None:
        """New optimizer settings; moments start from zero unless kept. ConfigError for another kind of optimizer."""
        if not same_optimizer(self._optim, optim):
            raise ConfigError(
                f"engine=deepspeed keeps one optimizer: optim.name={self._optim.name} cannot become {optim.name}."
            )
        self._optim = optim
        for group in self.optimizer.param_groups:
            decays = group["weight_decay"] > 0
            settings = {"betas": optim.betas, "eps": optim.eps, "momentum": optim.momentum, "alpha": optim.alpha}
            group.update({key: value for key, value in settings.items() if key in group})
            group["weight_decay"] = optim.weight_decay if decays else 0.0
        if self.stage:
            self._ds.optimizer.clip_grad = optim.clip_norm or 0.0
        if not keep_optimizer:
            self._kept.forget()


class _InAutocast(nn.Module):
    """The model under the run's autocast, inside of DeepSpeed, which turns off that of its caller."""

    def __init__(self, model: nn.Module, precision: PrecisionConfig, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self._precision, self._device = precision, device

    def forward(self, *arguments: Any) -> Any:
        with autocast(self._precision, self._device):
            return self.model(*arguments)


class ZeroScaler:
    """DeepSpeed's dynamic loss scale, with the state of our own."""

    def __init__(self, zero: Any) -> None:
        self._scaler = zero.loss_scaler

    def update(self, overflowed: Tensor, *, counted: Tensor) -> None:
        """Nothing: DeepSpeed has done it in the update."""

    def check(self) -> None:
        """Nothing: DeepSpeed raises in the update."""

    def state(self) -> dict[str, Any]:
        """JSON, as LossScaler.state."""
        good = self._scaler.cur_iter - self._scaler.last_overflow_iter - 1
        return {
            "scale": float(self._scaler.cur_scale),
            "good_updates": int(good % self._scaler.scale_window),
            "overflows": 0,
            "exhausted": False,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self._scaler.cur_scale = state["scale"]
        self._scaler.last_overflow_iter = -1
        self._scaler.cur_iter = state["good_updates"]


# ---- what is built once -----------------------------------------------------------------------------------


def _deepspeed(device: torch.device, world_size: int) -> Any:
    """The module deepspeed, quiet and for `device`, with a process group to work in."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")  # read at its import
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    if not dist.is_initialized():
        assert world_size == 1, "several workers need an initialised process group"
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    # of torch, about calls that DeepSpeed makes thousands of times
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    if get_accelerator().device_name() != device.type:
        raise ConfigError(
            f"engine=deepspeed works on {get_accelerator().device_name()} here (DS_ACCELERATOR="
            f"{os.environ['DS_ACCELERATOR']}), and the run on {device.type}: unset DS_ACCELERATOR or set device."
        )
    logger.setLevel(logging.ERROR)  # an update left out is told by the run itself
    # For the CPU it would compile a kernel of half a minute that serves inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _optimizer(
    model: nn.Module, optim: OptimConfig, device: torch.device, precision: PrecisionConfig
) -> tuple[torch.optim.Optimizer, dict[str, bool]]:
    """The optimizer of the model's parameters without state, and what state it keeps: kind -> whether a count.

    The state that belongs to whole tensors would be thrown away at once, so it is never made.
    """
    groups = parameter_groups(model, optim)
    samples = [
        {**group, "params": [(f"{index}", nn.Parameter(torch.zeros(1, device=device)))]}
        for index, group in enumerate(groups)
    ]
    optimizer = build_optimizer(samples, optim, device, precision)
    kinds = {kind: tensor.dim() == 0 for kind, tensor in next(iter(optimizer.state.values())).items()}
    optimizer.state.clear()
    for slot, group in zip(optimizer.param_groups, groups, strict=True):
        slot["params"] = [parameter for _, parameter in group["params"]]
        slot.pop("param_names", None)
    return optimizer, kinds
