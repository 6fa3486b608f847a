"""TorchEngine: forward and backward in the right precision, gradients over all ranks, and the update.

It yields and accepts named tensors only; files, steps and phases are the loop's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.adapters import kept_parameters
from trainers.config import OptimConfig, PrecisionConfig
from trainers.devices import set_determinism
from trainers.errors import CheckpointError, ConfigError
from trainers.gradient_sync import data_parallel
from trainers.incidents import SkippedUpdates, Update
from trainers.optim import build_optimizer, heeds_found_inf, parameter_groups, state_tensors
from trainers.precision import LossScaler, autocast
from trainers.shards import Shards

NamedTensors = dict[str, Tensor]


class TorchEngine:
    """A model, its optimizer and, with several workers, DistributedDataParallel, or FSDP2 where it is `sharded`.

    A step is some micro-batches and one update:

        with engine.micro_batch(last=...) as model:
            loss = objective.loss(model, batch, state)
            engine.backward(engine.normalise(loss.total, step_targets))
        update = engine.update(lr)

    An update whose loss or gradient is not finite on any rank leaves weights and moments untouched on all of them:
    a bad loss makes its gradients NaN, the all-reduce carries those to every rank, so every rank finds the same norm.
    Under fp16 a finite loss whose gradients overflow is no incident: it halves the loss scale.
    On the CPU (and MPS) the host decides. On CUDA the fused optimizer decides on the device and the host never waits
    for it; optimizers without a fused kernel (rmsprop, those of bitsandbytes) wait at every update.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optim: OptimConfig,
        precision: PrecisionConfig,
        device: torch.device,
        world_size: int,
        compile: bool,
        deterministic: bool,
        sharded: bool = False,
    ) -> None:
        set_determinism(deterministic)
        self.module = model
        """the bare model: its state; `whole` is for evaluation and generation"""
        self.device = device
        self.world_size = world_size
        self.precision = precision
        self.scaler = LossScaler(device) if precision.compute == "fp16" else None
        self._shards = Shards(model, compile=compile) if sharded and world_size > 1 else None
        self._ddp = data_parallel(model, device) if world_size > 1 and not sharded else None
        self._forward: nn.Module = self._ddp or model
        if compile and self._shards is None:
            self._forward = cast(nn.Module, torch.compile(self._forward))
        self.decides_on_device = device.type == "cuda"
        self.skipped = SkippedUpdates(device, self.scaler, world_size=world_size, on_device=self.decides_on_device)
        self._use(optim)

    def _use(self, optim: OptimConfig) -> None:
        groups = parameter_groups(self.module, optim)
        self._optim = optim
        # in the order of model.parameters(), as a plain loop would clip them: the order is part of the norm's bits
        self._parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        # Walking the modules takes longer than copying small ones, and a save should not.
        self._named = kept_parameters(self.module)
        self._buffers = self.module.state_dict().keys() & {name for name, _ in self.module.named_buffers()}
        self._names = {id(parameter): name for name, parameter in self._named}
        self.optimizer = build_optimizer(groups, optim, self.device, self.precision)
        if self._shards is not None:
            self._shards.fit(self.optimizer)

    def close(self) -> None:
        """Nothing to let go of."""

    # ---- a step ---------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[nn.Module]:
        """The module to call for one forward; ranks exchange gradients only in the backward of the `last`."""
        quiet = nullcontext() if self._ddp is None or last else self._ddp.no_sync()
        if self._shards is not None:
            self._shards.exchange(last)
        with quiet, autocast(self.precision, self.device):
            yield self._forward

    def normalise(self, total: Tensor, step_targets: int) -> Tensor:
        """This rank's part of the step's mean loss per target, from the micro-batch's summed loss.

        `step_targets` counts the scored targets of the whole step: all micro-batches of all ranks. DDP takes the mean
        over ranks, so the parts are world_size times too large, and its result is the gradient of (sum over all
        targets) / step_targets however they were spread. With one rank this is total / step_targets, whose gradient
        has the bits of F.cross_entropy(..., reduction="mean").
        """
        return rank_part(total, step_targets, self.world_size)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; to be called inside micro_batch. A non-finite loss makes them NaN."""
        self.skipped.see(loss)
        if self.scaler is not None:
            loss = self.scaler.scaled(loss)
        # 1 for a finite loss, NaN otherwise: an infinite loss can have finite gradients, and other ranks see only those
        seed = loss.detach() * 0.0 + 1.0
        if self.precision.compute == "fp32":
            torch.autograd.backward(loss, seed)
        else:
            with torch.autocast(self.device.type, enabled=False):  # backward repeats the types of the forward by itself
                torch.autograd.backward(loss, seed)

    def update(self, lr: float) -> Update:
        """Clip and apply the accumulated gradients at rate `lr`, then clear them."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale(gradients)
        norm = self._clip(gradients)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        skipped = self._step_on_device(norm) if self.decides_on_device else self._step_on_host(norm)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, skipped)

    def _clip(self, gradients: list[Tensor]) -> Tensor:
        limit = self._optim.clip_norm
        if limit is None:
            norm = torch.nn.utils.get_total_norm(gradients)
        else:
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit)
        return norm if self._shards is None else self._shards.gathered(norm)

    def _step_on_host(self, norm: Tensor) -> bool:
        left_out = ~torch.isfinite(norm)
        skipped = bool(left_out)
        if not skipped:
            self.optimizer.step()
        self.skipped.count(left_out)
        return skipped

    def _step_on_device(self, norm: Tensor) -> Tensor:
        skipped = ~torch.isfinite(norm)
        if not heeds_found_inf(self.optimizer):
            if not bool(skipped):
                self.optimizer.step()
        else:  # the fused kernels leave everything as it is where found_inf is 1, as under torch.amp.GradScaler
            self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.skipped.count(skipped)
        return skipped

    # ---- state ----------------------------------------------------------------------------------

    def gradients(self) -> Iterator[Tensor]:
        """What this rank holds of the gradients between the last backward and the update; slices of sharded ones."""
        return (parameter.grad for parameter in self._parameters if parameter.grad is not None)

    def masters(self) -> Iterator[Tensor]:
        """The weights that are updated where the model computes with copies of them: here it has none."""
        return iter(())

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """A plain module with all weights on this rank, for any use; a collective to enter."""
        if self._shards is None:
            yield self.module
            return
        with self._shards.whole() as module:
            yield module

    def tensors(self) -> dict[str, NamedTensors]:
        """`model`: parameters (tied ones once; of a model with adapters those alone) and persistent buffers;
        `optimizer`: `exp_avg/<parameter>` and so on.

        Live storage, no copies, the same on every rank; of shards whole copies on the CPU of rank 0, nothing on the
        others. Every rank calls it.
        """
        return self._held() if self._shards is None else self._shards.collected(self._held())

    def saved(self) -> dict[str, NamedTensors]:
        """What this rank writes of `tensors` into a checkpoint, by file: live storage. Of a model that every rank has
        whole all is rank 0's; of shards each rank's own slices, as its part. Every rank calls it."""
        if self._shards is not None:
            return self._shards.parts(self._held())
        return self._held() if self.world_size == 1 or dist.get_rank() == 0 else {}

    def _held(self) -> dict[str, NamedTensors]:
        """Live; a sharded tensor as the DTensor whose slice this rank has."""
        return {"model": self._model_tensors(), "optimizer": self._optimizer_tensors()}

    def _model_tensors(self) -> NamedTensors:
        buffers = self.module.named_buffers() if self._buffers else ()
        kept = ((name, buffer) for name, buffer in buffers if name in self._buffers)
        return {name: tensor.detach() for name, tensor in chain(self._named, kept)}

    def _optimizer_tensors(self) -> NamedTensors:
        return state_tensors(self.optimizer, self._names)

    def state(self) -> dict[str, Any]:
        """JSON: what continues besides the tensors; waits for the device."""
        return self.skipped.state()

    def load(self, files: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], *, optimizer: bool) -> None:
        """Take over `files` and `state` as `tensors()` and `state()` gave them; only the weights unless `optimizer`.

        Call begin_phase with the phase's settings first. Raises CheckpointError, naming the tensors, where names,
        shapes or, with the optimizer, types differ; then nothing was changed. Weights alone may be of another type.
        """
        copies = matched("model", files["model"], self._model_tensors(), cast=not optimizer)
        if optimizer:
            copies += matched("optimizer", files["optimizer"], self._optimizer_tensors())
            self.skipped.load(state)
        with torch.no_grad():
            for target, source in copies:
                if self._shards is None:
                    target.copy_(source)
                else:
                    self._shards.put(target, source)
        self.optimizer.zero_grad(set_to_none=True)

    def begin_phase(self, optim: OptimConfig, *, keep_optimizer: bool) -> None:
        """New optimizer settings; moments start from zero unless kept. ConfigError where they cannot be kept."""
        before, kept = self._optim, self._optimizer_tensors()
        if keep_optimizer and not same_optimizer(before, optim):
            raise ConfigError(
                f"hand_over=optimizer needs the same optimizer in both phases, but the phase before used "
                f"optim.name={before.name} (momentum {before.momentum:g}) and this one {optim.name} "
                f"(momentum {optim.momentum:g}). Set hand_over=weights or make them equal."
            )
        self._use(optim)
        if keep_optimizer:
            for target, source in matched("optimizer", kept, self._optimizer_tensors()):
                target.copy_(source)


def rank_part(total: Tensor, step_targets: int, world_size: int) -> Tensor:
    """A micro-batch's summed loss as this rank's part of the step's mean per target, times the ranks."""
    assert step_targets > 0, "a step without a single scored target"
    return total / (step_targets / world_size)


def same_optimizer(one: OptimConfig, other: OptimConfig) -> bool:
    """Whether both keep the same state."""
    return (one.name, bool(one.momentum)) == (other.name, bool(other.momentum))


def matched(
    what: str, given: Mapping[str, Tensor], own: NamedTensors, *, cast: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """(own tensor, given tensor) by name; CheckpointError where the two sets do not match. Types may differ if `cast`:
    what starts from weights rounds or widens them, what goes on must have its own."""
    missing, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    problems = [f"{name} is missing" for name in sorted(missing)] + [f"{name} is unknown" for name in sorted(unknown)]
    for name in sorted(own.keys() & given.keys()):
        here, there = own[name], given[name]
        if here.shape != there.shape or (here.dtype != there.dtype and not cast):
            problems.append(f"{name} is {_kind(there)}, needed {_kind(here)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"the checkpoint's {what} tensors do not fit this configuration: {'; '.join(problems[:5])}{more}. "
            f"Use the configuration that the checkpoint was written with."
        )
    return [(own[name], given[name]) for name in own]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
