"""Where a value stopped being finite: the micro-batches of the step run once more, watched module by module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainers.data.types import Batch
from trainers.precision import autocast
from trainers.seeds import stream_seed

if TYPE_CHECKING:
    from trainers.phase import ActivePhase
    from trainers.run import Run


def account(run: Run, phase: ActivePhase, batches: Sequence[Batch]) -> str:
    """What is known about the update just left out: which sequences it saw, and where they went wrong.

    `batches` are this rank's. Weights, generators and streams are left as they are. To be called where the host
    decides about an update: elsewhere several steps have passed since the bad one.
    """
    per_step = run.config.sequences_per_step
    first = (run.progress.phase_step - 1) * per_step
    with run.engine.whole() as model:
        losses = [partial(_loss, run, phase, model, index, batch) for index, batch in enumerate(batches)]
        place, found = diagnose(model, losses)
    if place is not None:
        per_rank, rows = per_step // run.ctx.world_size, len(batches[place].tokens)
        first += run.rank * per_rank + place * rows
        per_step = rows
    return f"Sequences {first:,} to {first + per_step - 1:,} of phase {phase.name!r}: {found}"


def _loss(run: Run, phase: ActivePhase, model: nn.Module, index: int, batch: Batch) -> Tensor:
    """The loss of a micro-batch of the last step, dropout and all."""
    if phase.draws_noise:
        torch.manual_seed(stream_seed(run.config.seed, "dropout", run.progress.step - 1, index, run.rank))
    with autocast(run.engine.precision, run.device):
        return run.objective.loss(model, run.to_device(batch), run.streams.enter(index, batch)).total


def diagnose(model: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> tuple[int | None, str]:
    """The first of `losses`, each a forward through `model`, in which something is not finite, and what that is.

    (None, ...) where it is a weight, or where everything is finite.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return None, f"the weight {name} is not finite"
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with torch.random.fork_rng():
        for index, loss in enumerate(losses):
            with _watched(model) as seen:
                total = loss()
            if seen.bad is not None:
                return index, f"the first output that is not finite is that of {seen.bad} ({seen.largest_told})"
            if not _finite(total):
                return index, f"every output is finite, the loss is not ({seen.largest_told})"
            gradients = torch.autograd.grad(total, [parameter for _, parameter in parameters], allow_unused=True)
            for (name, _), gradient in zip(parameters, gradients, strict=True):
                if gradient is not None and not _finite(gradient):
                    return index, f"the gradient of {name} is not finite, every output is ({seen.largest_told})"
    return None, "run once more, every output and gradient is finite"


@dataclass
class _Seen:
    """What a forward brought to light."""

    bad: str | None = None
    """the first module whose output was not finite; a part ends before the whole it belongs to"""
    largest: float = -math.inf
    """absolute value, among finite ones"""
    at: str = ""

    @property
    def largest_told(self) -> str:
        return f"the largest finite one, {self.largest:.3g}, is of {self.at}" if self.at else "no module has any"

    def look(self, name: str, output: Tensor) -> None:
        values = output.detach().abs().float()
        if self.bad is None and not _finite(values):
            self.bad = name
        largest = float(torch.where(torch.isfinite(values), values, -math.inf).max()) if values.numel() else -math.inf
        if largest > self.largest:
            self.largest, self.at = largest, name


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Seen]:
    seen = _Seen()

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                seen.look(name or "the model", tensor)

        return look

    hooks = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for one in hooks:
            one.remove()


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
