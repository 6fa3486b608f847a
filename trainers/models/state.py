"""What a model may carry from one chunk of a stream to the next, and what every model offers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

State = dict[str, torch.Tensor]
"""runtime state by name; the first dimension of every tensor is the row (one stream a row)"""


class LanguageModel(Protocol):
    """A module that scores what follows each token."""

    def __call__(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """tokens int64 (rows, T) -> logits (rows, T, vocab_size) and the state behind them."""
        ...

    def initial_state(self, rows: int) -> State | None:
        """The state before the first token of so many streams; None: the model carries none."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...
