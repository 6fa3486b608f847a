"""Text from a model: batches of prompts, or one prompt as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainers.data.types import Tokenizer
from trainers.models.reading import Reader, open_reader
from trainers.sampling import GenerateConfig, choose
from trainers.seeds import stream_seed

__all__ = ["GenerateConfig", "generate", "stream"]

ROWS_AT_ONCE = 16  # prompts that share a forward pass; results do not depend on it
PROMPT_TAIL = 8  # tokens of the prompt decoded along with the first new ones, so that word boundaries come out right


def generate(model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[str], config: GenerateConfig) -> list[str]:
    """What the model writes after each prompt, without the prompt.

    A text ends at max_tokens, before a stop sequence, or where the model writes the tokenizer's end-of-text token.
    Prompt i draws from its own generator seeded by (config.seed, i): its text does not depend on the other prompts,
    and torch's global generators are left alone. An empty prompt starts from the end-of-text token, which stands
    between documents; without one, from a newline; without that, from token 0. Longer texts than the model's context
    go on in a window (`trainers.models.reading.window_start`). The model runs in eval mode and returns to its own.
    """
    texts: list[str] = []
    for first in range(0, len(prompts), ROWS_AT_ONCE):
        writers = [
            _Writer(tokenizer, prompt, config, first + i)
            for i, prompt in enumerate(prompts[first : first + ROWS_AT_ONCE])
        ]
        parts = ["".join(part) for part in zip(*_write(model, writers), strict=True)]
        texts.extend(parts)
    return texts


def stream(model: nn.Module, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> Iterator[str]:
    """The text that `generate` would write after this one prompt, piece by piece as it becomes certain."""
    for (piece,) in _write(model, [_Writer(tokenizer, prompt, config, 0)]):
        if piece:
            yield piece


def _write(model: nn.Module, writers: list[_Writer]) -> Iterator[list[str]]:
    """One piece of text a writer each step, until all are done."""
    reader = open_reader(model, len(writers))
    new = [writer.start for writer in writers]
    while not all(writer.done for writer in writers):
        logits = _read(model, reader, new)
        # a finished row keeps its place and reads its last token again: nobody looks at what follows
        new = [
            [writer.last if writer.done else writer.choose(row)] for writer, row in zip(writers, logits, strict=True)
        ]
        yield [writer.piece() for writer in writers]


@torch.no_grad()
def _read(model: nn.Module, reader: Reader, new: list[list[int]]) -> Tensor:
    with _evaluating(model):
        return reader.read(new).float().cpu()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; then every module is back in its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Writer:
    """One text in the making: which tokens, when it ends, which characters are certain."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, config: GenerateConfig, index: int) -> None:
        self._config = config
        self._eos_id = tokenizer.eos_id
        self._vocab_size = tokenizer.vocab_size
        self._generator = torch.Generator().manual_seed(stream_seed(config.seed, "sampling", index))
        prompt_ids = [int(token) for token in tokenizer.encode(prompt)]
        self.start = prompt_ids or [_first_token(tokenizer)]
        self._seen = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
        self._seen[prompt_ids] = True
        self._text = _Detokenizer(tokenizer, prompt_ids[-PROMPT_TAIL:])
        self._pending = ""
        self._new_tokens = 0
        self.last = self.start[-1]
        self.done = False

    def choose(self, logits: Tensor) -> int:
        """The next token from logits (V,); sets `done` where the text ends with it."""
        # a model's table may have more rows than the tokenizer has ids; those decode to nothing
        token = choose(logits[: self._vocab_size], self._seen, self._config, self._generator)
        self.last = token
        self._new_tokens += 1
        if token == self._eos_id:
            self._finish()
            return token
        self._seen[token] = True
        self._pending += self._text.push(token)
        if find_stop(self._pending, self._config.stop) is not None or self._new_tokens == self._config.max_tokens:
            self._finish()
        return token

    def piece(self) -> str:
        """The characters that have become certain since the last call."""
        ready = len(self._pending) if self.done else len(self._pending) - held_back(self._pending, self._config.stop)
        piece, self._pending = self._pending[:ready], self._pending[ready:]
        return piece

    def _finish(self) -> None:
        self._pending += self._text.flush()
        self._pending = self._pending[: find_stop(self._pending, self._config.stop)]
        self.done = True


class _Detokenizer:
    """Turns tokens into text one by one in constant time, holding back characters of which bytes are missing."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._context = context
        """tokens whose text is out already; decoded again, for the text of a token may depend on the one before"""
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._new.append(token)
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # part of a UTF-8 character: wait for its other bytes
            return ""
        # what decodes to nothing (a special token) gives no context, so the old one stays in front of it
        self._context, self._new = (self._new if text else self._context + self._new), []
        return text

    def flush(self) -> str:
        """The characters still held back."""
        text = self._text() if self._new else ""
        self._new = []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        both = self._tokenizer.decode([*self._context, *self._new])
        return both[len(before) :]


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop sequence begins in the text; None where there is none."""
    return min((found for found in (text.find(sequence) for sequence in stop) if found >= 0), default=None)


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of the text may turn out to begin a stop sequence."""
    return max((n for sequence in stop for n in range(1, len(sequence)) if text.endswith(sequence[:n])), default=0)


def _first_token(tokenizer: Tokenizer) -> int:
    """What an empty prompt starts from; see `generate`."""
    if tokenizer.eos_id is not None:
        return tokenizer.eos_id
    newline = tokenizer.encode("\n")
    return int(newline[0]) if len(newline) else 0
