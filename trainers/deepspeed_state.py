"""ZeroState: what DeepSpeed keeps in flat slices over the ranks, read and written as whole named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.engine import NamedTensors, matched
from trainers.errors import CheckpointError

STEP = "step"


class ZeroState:
    """The weights and the optimizer state of `model` under the DeepSpeed engine `ds`, around torch's `optimizer`.

    From stage 1 on the optimizer updates slices of groups of tensors in fp32, and the model computes with copies of
    the weights, which at stage 3 are slices too. At stage 0 it updates the parameters themselves.
    Every method is a collective but where it says so.
    """

    def __init__(
        self,
        model: nn.Module,
        ds: Any,
        optimizer: torch.optim.Optimizer,
        kinds: Mapping[str, bool],
        shapes: Mapping[str, torch.Size],
        stage: int,
    ) -> None:
        self._model, self._optimizer, self._shapes, self._stage = model, optimizer, shapes, stage
        self._named = list(model.named_parameters())
        self._trained = [name for name, parameter in self._named if parameter.requires_grad]
        self._buffers = model.state_dict().keys() & {name for name, _ in model.named_buffers()}
        self._zero = ds.optimizer
        self._slices = _slices(ds.optimizer, stage)
        self._moments = [kind for kind, is_count in kinds.items() if not is_count]
        self._counts = STEP in kinds
        self._begin(kinds)
        if stage in (1, 2):  # else done after the first update, too late for a checkpoint to be loaded
            ds.optimizer._lazy_init_hp_params_optimizer_state()

    def _begin(self, kinds: Mapping[str, bool]) -> None:
        """Zero state from the start, as TorchEngine's: a checkpoint of step 0 has the names of any other."""
        for part in self._slices:
            self._optimizer.state[part] = {
                kind: torch.zeros((), dtype=torch.float32, device=part.device) if is_count else torch.zeros_like(part)
                for kind, is_count in kinds.items()
            }

    def forget(self) -> None:
        """Moments and steps to zero."""
        for state in self._optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    # ---- counting: no collectives -----------------------------------------------------------------

    def masters(self) -> Iterator[Tensor]:
        """The slices that are updated, but those that share their storage with the model's weights."""
        weights = {getattr(p, "ds_tensor", p).untyped_storage().data_ptr() for _, p in self._named}
        return (part for part in self._slices if part.untyped_storage().data_ptr() not in weights)

    def gradients(self) -> Iterator[Tensor]:
        """Everything that holds gradients between the last backward and the update; several may share a storage.

        While they add up, stage 1 keeps those of all weights (a sum in another type as `grad_accum`), 2 and 3 what this
        rank updates; where the optimizer is offloaded, on the CPU too.
        """
        for owner in [*(parameter for _, parameter in self._named), *self._slices]:
            yield from (part for name in ("grad", "grad_accum") if (part := getattr(owner, name, None)) is not None)
        for name in ("averaged_gradients", "all_grad_tensors", "accumulated_grads_in_cpu"):
            for group in getattr(self._zero, name, {}).values():
                yield from [group] if isinstance(group, Tensor) else group or ()
        if (buffer := getattr(self._zero, "grad_partitions_flat_buffer", None)) is not None:
            yield buffer

    # ---- reading --------------------------------------------------------------------------------

    def weights(self) -> NamedTensors:
        """The whole copies that the model computes with, on every rank; live storage below stage 3."""
        return {name: self._gathered(parameter) for name, parameter in self._named}

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        if self._stage < 3:
            return parameter.data
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.data.clone()

    def tensors(self) -> dict[str, NamedTensors]:
        """Whole tensors in fp32 on rank 0, nothing on the others.

        Live storage at stage 0, else copies on the CPU, gathered one after the other.
        """
        model, optimizer = (self._own_model(), self._own_optimizer()) if not self._stage else self._collected()
        return {"model": model, "optimizer": optimizer} if dist.get_rank() == 0 else {}

    def _collected(self) -> tuple[NamedTensors, NamedTensors]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        model, optimizer = self._kept_buffers(), NamedTensors()
        count = float(self._optimizer.state[self._slices[0]][STEP]) if self._counts else 0.0
        for name, parameter in self._named:
            trained = parameter.requires_grad
            weight = safe_get_full_fp32_param(parameter) if trained else self._gathered(parameter)
            moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in self._moments if trained}
            if dist.get_rank() > 0:
                continue
            model[name] = _on_cpu(weight, self._shapes[name])
            optimizer |= {f"{kind}/{name}": _on_cpu(moment, self._shapes[name]) for kind, moment in moments.items()}
            if self._counts and trained:
                optimizer[f"{STEP}/{name}"] = torch.tensor(count)
        return model, optimizer

    def _own_model(self) -> NamedTensors:
        return {**{name: parameter.detach() for name, parameter in self._named}, **self._kept_buffers()}

    def _own_optimizer(self) -> NamedTensors:
        names = {id(parameter): name for name, parameter in self._named}
        return {
            f"{kind}/{names[id(parameter)]}": tensor
            for parameter, state in self._optimizer.state.items()
            for kind, tensor in state.items()
        }

    def _kept_buffers(self) -> NamedTensors:
        return {name: buffer for name, buffer in self._model.named_buffers() if name in self._buffers}

    # ---- writing --------------------------------------------------------------------------------

    def check(self, files: Mapping[str, Mapping[str, Tensor]], *, optimizer: bool) -> None:
        """CheckpointError, naming the tensors, where names, shapes or, with the optimizer, types are not those that
        `tensors` gives."""
        own = {name: torch.empty(shape, device="meta") for name, shape in self._shapes.items()}
        matched("model", files["model"], {**own, **self._kept_buffers()}, cast=not optimizer)
        if optimizer:
            moments = {f"{kind}/{name}": own[name] for kind in self._moments for name in self._trained}
            counts = {f"{STEP}/{name}": torch.empty((), device="meta") for name in self._trained if self._counts}
            matched("optimizer", files["optimizer"], {**moments, **counts})
            self._agreed_count(files["optimizer"])

    def _agreed_count(self, given: Mapping[str, Tensor]) -> float:
        """The step that all tensors of a checkpoint have reached; ZeRO keeps one for a whole slice."""
        counts = {float(given[f"{STEP}/{name}"]) for name in self._trained if self._counts}
        if len(counts) > 1:
            raise CheckpointError(
                f"the checkpoint's tensors have been updated unequally often ({sorted(counts)}), and engine=deepspeed "
                f"counts once for all of them. Go on with engine=torch."
            )
        return counts.pop() if counts else 0.0

    @torch.no_grad()
    def put(self, files: Mapping[str, Mapping[str, Tensor]], *, optimizer: bool) -> None:
        """Take over what `check` accepted, whole on every rank; the weights alone unless `optimizer`."""
        for name, buffer in self._kept_buffers().items():
            buffer.copy_(files["model"][name])
        for name, parameter in self._named:
            self.put_weight(parameter, files["model"][name])
        if not optimizer:
            return
        if not self._stage:
            for name, tensor in self._own_optimizer().items():
                tensor.copy_(files["optimizer"][name])
        else:
            self._put_slices(files["optimizer"])

    def put_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Into the slices, and into the copies that the forward computes with: DeepSpeed's setters leave those."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param

        if self._stage and parameter.requires_grad:
            safe_set_full_fp32_param(parameter, value.to(self._slices[0].device, self._slices[0].dtype))
        if self._stage < 3:
            parameter.data.copy_(value)
            return
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def _put_slices(self, given: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, parameter in self._named:
            for kind in self._moments if parameter.requires_grad else ():
                safe_set_full_optimizer_state(parameter, given[f"{kind}/{name}"].to(self._slices[0].device), kind)
        count = self._agreed_count(given)
        for part in self._slices if self._counts else ():
            self._optimizer.state[part][STEP].fill_(count)


def _slices(optimizer: Any, stage: int) -> list[Tensor]:
    """What the torch optimizer really updates on this rank: flat fp32 slices, or at stage 0 the parameters."""
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if stage:
        return list(optimizer.single_partition_of_fp32_groups)
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _on_cpu(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.detach().reshape(shape).to("cpu", torch.float32)
