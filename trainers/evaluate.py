"""Scores of a model on a fixed validation text: every token once, alike on any number of workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.config import PrecisionConfig
from trainers.data.types import IGNORED, Batch
from trainers.errors import DataError
from trainers.objectives import Objective, State
from trainers.precision import autocast

PERPLEXITY_CAP = 20.0  # nats; above, exp() says nothing and is given as infinity


class ValidationText(Protocol):
    """What evaluate needs of PackedTokens."""

    tokens: np.ndarray
    n_bytes: int
    n_chars: int


def evaluate(
    model: nn.Module,
    validation: ValidationText,
    *,
    sequence_length: int,
    rows: int,
    device: torch.device,
    precision: PrecisionConfig,
    objective: Objective,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """Metrics of `model` on the validation text; a collective, with the same result on every rank.

    The text's first token has no context; every later one (or the first `max_tokens` of them) is a target exactly
    once, in windows of `sequence_length` that do not overlap, the last one as long as it comes. A model with runtime
    state reads `rows` contiguous stretches of the text side by side, each from a fresh state carried to its end, on
    every rank alike (a chain cannot be shared out); other models share the batches out over the ranks. A batch has
    the same rows for any world size and its float64 sums are added in one order, so the result has the same bits for
    1 and n workers that compute with equal thread counts. Dropout is off; modes and random generators are put back.

    val/loss is the mean in nats over targets; val/perplexity its exp, infinite from 20 nats on; bits per byte and
    per character divide the summed loss in bits by the share of the text's bytes and characters that the targets are
    of its tokens. Raises DataError for a text without a target.
    """
    tokens, targets = len(validation.tokens), count_targets(validation, max_tokens)
    initial_state = cast(Callable[[int], State | None], model.initial_state)
    carries_state = initial_state(1) is not None
    windows = _Windows(validation.tokens, targets, sequence_length, rows, contiguous=carries_state)
    state = _moved(initial_state(windows.rows), device)
    with _undisturbed(model, device), torch.no_grad(), autocast(precision, device):
        sums = _score(model, windows, objective, state, device, rank, world_size)
    nll, correct, scored = sums.sum(dim=0).tolist()
    assert scored == targets, f"scored {scored:.0f} of {targets} targets"
    loss, bits, share = nll / targets, nll / math.log(2), targets / tokens
    return {
        "val/loss": loss,
        "val/perplexity": math.exp(loss) if loss < PERPLEXITY_CAP else math.inf,
        "val/bits_per_byte": bits / (validation.n_bytes * share),
        "val/bits_per_character": bits / (validation.n_chars * share),
        "val/accuracy": correct / targets,
        "val/tokens": float(targets),
    }


def count_targets(validation: ValidationText, max_tokens: int | None) -> int:
    """Tokens of the text that are scored. DataError where there is none."""
    available = len(validation.tokens) - 1
    if available < 1:
        raise DataError(
            f"the validation text has {available + 1} tokens, and scoring needs at least 2 (the first has no context). "
            f"Use more text or a larger data.validation.fraction."
        )
    return min(available, max_tokens or available)


# ---- cutting the text --------------------------------------------------------------------------------


class _Windows:
    """The text in batches of windows; window w has its inputs from token w * length on."""

    def __init__(self, tokens: np.ndarray, targets: int, length: int, rows: int, *, contiguous: bool) -> None:
        count = math.ceil(targets / length)
        self.tokens, self.targets, self.length = tokens, targets, length
        self.rows = min(rows, count)
        self.steps = math.ceil(count / self.rows)
        self.contiguous = contiguous
        """each row reads a stretch of its own, instead of all rows side by side"""

    def read(self, step: int) -> Batch:
        """Batch `step` on the CPU, filled up with token 0 that nobody scores."""
        inputs = np.zeros((self.rows, self.length), dtype=np.int64)
        wanted = np.full((self.rows, self.length), IGNORED, dtype=np.int64)
        n_targets = 0
        for row in range(self.rows):
            window = row * self.steps + step if self.contiguous else step * self.rows + row
            start = window * self.length
            n = min(self.length, self.targets - start)
            if n > 0:
                piece = np.asarray(self.tokens[start : start + n + 1])
                inputs[row, :n], wanted[row, :n] = piece[:-1], piece[1:]
                n_targets += n
        return Batch(torch.from_numpy(inputs), torch.from_numpy(wanted), n_targets)


# ---- scoring -----------------------------------------------------------------------------------------


def _score(
    model: nn.Module,
    windows: _Windows,
    objective: Objective,
    state: State | None,
    device: torch.device,
    rank: int,
    world_size: int,
) -> Tensor:
    """float64 (batches, 3) on the CPU: summed loss in nats, correct and scored targets of each batch."""
    # Apple's GPUs have no float64; elsewhere the sums stay on the device until all batches are done
    sums = torch.zeros((windows.steps, 3), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    shared = world_size > 1 and state is None
    for step in range(rank, windows.steps, world_size) if shared else range(windows.steps):
        batch = windows.read(step)
        scores = objective.scores(model, _on_device(batch, device), state)
        state = scores.state
        sums[step, 0] = scores.nll.to(sums.device).double().sum()
        sums[step, 1] = scores.correct.sum().to(sums.device)
        sums[step, 2] = batch.n_targets
    sums = sums.cpu()
    if shared:
        dist.all_reduce(sums)  # each row is one rank's and zero on the others, so adding up is exact
    return sums


def _on_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.tokens.to(device), batch.targets.to(device), batch.n_targets)


def _moved(state: State | None, device: torch.device) -> State | None:
    return None if state is None else {name: tensor.to(device) for name, tensor in state.items()}


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode and the random generators as they were, after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes:
            module.training = training
