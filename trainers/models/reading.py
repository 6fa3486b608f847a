"""Readers: how a model is fed a growing text and asked what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from trainers.models.gpt import GPT
from trainers.models.state import LanguageModel, State


def window_start(length: int, context_length: int) -> int:
    """Where the window begins that predicts what follows a text of `length` tokens.

    The whole text while it fits. Past context_length the window keeps its later half and grows again: absolute
    positions cannot slide one by one under a cache, and a window encoded afresh is exact for every scheme. It depends
    on the length alone, so a long prompt is read as if it had been written token by token.
    """
    if length <= context_length:
        return 0
    hop = context_length - context_length // 2
    return -(-(length - context_length) // hop) * hop


class Reader(Protocol):
    """Reads several texts at once."""

    def read(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Appends each row's new tokens (at least one); logits (rows, V) of what follows each row."""
        ...


def open_reader(model: nn.Module, rows: int) -> Reader:
    """The fastest reader the model allows: cached, with explicit state, or the whole window each time."""
    inner = getattr(model, "_orig_mod", model)  # torch.compile wraps: decoding steps differ in shape, so run it bare
    if isinstance(inner, GPT):
        return CachedReader(inner, rows)
    language_model = cast(LanguageModel, model)
    if language_model.initial_state(1) is not None:
        return StateReader(language_model, rows)
    return WindowReader(language_model, rows)


class CachedReader:
    """Feeds a GPT only what is new; a row whose window moves is encoded afresh among the others."""

    def __init__(self, model: GPT, rows: int) -> None:
        self._model = model
        self._cache = model.new_cache(rows)
        self._texts: list[list[int]] = [[] for _ in range(rows)]
        self._starts = [0] * rows

    def read(self, new: Sequence[Sequence[int]]) -> Tensor:
        """See Reader."""
        feeds = [self._feed(row, tokens) for row, tokens in enumerate(new)]
        device = self._cache.lengths.device
        counts = torch.tensor([len(feed) for feed in feeds], device=device)
        width = max(map(len, feeds))
        tokens = torch.tensor([[*feed, *[0] * (width - len(feed))] for feed in feeds], device=device)
        return self._model.decode(tokens, self._cache, counts)

    def _feed(self, row: int, tokens: Sequence[int]) -> list[int]:
        """What the model must read of this row: the new tokens, or its whole window where that has moved."""
        text = self._texts[row]
        text.extend(tokens)
        start = window_start(len(text), self._model.context_length)
        if start == self._starts[row]:
            return list(tokens)
        self._starts[row] = start
        self._cache.drop([row])
        return text[start:]


class StateReader:
    """Steps a model that carries runtime state; each row has its own, for rows differ in length."""

    def __init__(self, model: LanguageModel, rows: int) -> None:
        self._model = model
        self._states: list[State | None] = [model.initial_state(1) for _ in range(rows)]

    def read(self, new: Sequence[Sequence[int]]) -> Tensor:
        """See Reader."""
        return torch.cat([self._step(row, tokens) for row, tokens in enumerate(new)])

    def _step(self, row: int, tokens: Sequence[int]) -> Tensor:
        logits, self._states[row] = self._model(_row(tokens, self._model), self._states[row])
        return logits[:, -1]


class WindowReader:
    """Runs a model that has neither cache nor state over each row's whole window, every time."""

    def __init__(self, model: LanguageModel, rows: int) -> None:
        self._model = model
        self._texts: list[list[int]] = [[] for _ in range(rows)]

    def read(self, new: Sequence[Sequence[int]]) -> Tensor:
        """See Reader."""
        for text, tokens in zip(self._texts, new, strict=True):
            text.extend(tokens)
        return torch.cat([self._model(_row(self._window(text), self._model), None)[0][:, -1] for text in self._texts])

    def _window(self, text: list[int]) -> list[int]:
        context_length = getattr(self._model, "context_length", len(text))
        return text[window_start(len(text), context_length) :]


def _row(tokens: Sequence[int], model: LanguageModel) -> Tensor:
    """One row on the model's device."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return torch.tensor([list(tokens)], device=device)
