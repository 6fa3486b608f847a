"""The peer: what a person would write by hand. Same model, data and seed as ours; 40 lines, no features."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class BareLoop:
    """A plain PyTorch training loop over rows of a packed token file."""

    def __init__(self, model: nn.Module, tokens: np.ndarray, order: np.ndarray, length: int, lrs: list[float]):
        self.model, self.device = model.train(), next(model.parameters()).device.type
        self.tokens, self.order, self.length, self.lrs = tokens, order, length, lrs
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - embeddings
        groups = [
            {"params": [p for p in model.parameters() if id(p) in linears], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if id(p) not in linears], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self.seeds: list[int] | None = None  # of the dropout masks, one a step: only to compare losses bit for bit
        self.dtype: torch.dtype | None = None  # autocast to this
        self.step_number = 0
        self.losses: list[float] = []

    def step(self) -> None:
        if self.seeds is not None:
            torch.manual_seed(self.seeds[self.step_number])
        rows = self.order[self.step_number]
        block = np.stack([self.tokens[r * self.length : r * self.length + self.length + 1] for r in rows])
        batch = torch.from_numpy(block.astype(np.int64))
        if self.device != "cpu":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lrs[self.step_number]
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype is not None):
            logits, _ = self.model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        if self.step_number % 10 == 0:
            self.losses.append(loss.item())
