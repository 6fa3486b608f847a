"""Next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.data.types import IGNORED, Batch
from trainers.objectives import Loss, Scores, State


@dataclass(frozen=True)
class LanguageModel:
    """Cross-entropy of the next token, summed over the targets that are not IGNORED."""

    label_smoothing: float = 0.0
    """share of the target's probability spread over the vocabulary (Szegedy et al. 2016, section 7); training only"""

    def loss(self, model: nn.Module, batch: Batch, state: State | None, *, with_metrics: bool = False) -> Loss:
        """One micro-batch; `with_metrics` adds `correct`, the number of targets that are the likeliest token."""
        logits, after = model(batch.tokens, state)
        total = F.cross_entropy(
            _wide(logits).flatten(0, 1),
            batch.targets.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        metrics = {"correct": (logits.detach().argmax(-1) == batch.targets).sum()} if with_metrics else {}
        return Loss(total, after, metrics)

    @torch.no_grad()
    def scores(self, model: nn.Module, batch: Batch, state: State | None) -> Scores:
        logits, after = model(batch.tokens, state)
        logits = _wide(logits)
        nll = F.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(batch.targets)
        return Scores(nll, logits.argmax(-1) == batch.targets, after)


def _wide(logits: Tensor) -> Tensor:
    """Logits in at least fp32: a sum over a large vocabulary needs the digits."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
