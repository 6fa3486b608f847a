"""Evaluation: each token once, exactly, and without a trace."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainers.config import PrecisionConfig
from trainers.errors import DataError
from trainers.evaluate import evaluate
from trainers.objectives.language_model import LanguageModel

CPU = torch.device("cpu")
VOCABULARY = 11


class Causal(nn.Module):
    """One causal attention head over embeddings; no runtime state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.dropout = nn.Dropout(0.5)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def initial_state(self, rows: int) -> None:
        return None

    def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        x = self.dropout(self.embedding(tokens))
        mixed = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), is_causal=True)
        return self.head(x + mixed), None


class Recurrent(nn.Module):
    """A GRU that carries its hidden vector from chunk to chunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.cell = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, VOCABULARY)

    def initial_state(self, rows: int) -> dict[str, Tensor]:
        return {"hidden": torch.zeros(rows, 8)}

    def forward(self, tokens: Tensor, state: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = (state or self.initial_state(len(tokens)))["hidden"]
        output, last = self.cell(self.embedding(tokens), hidden[None])
        return self.head(output), {"hidden": last[0]}


class Text:
    def __init__(self, n: int) -> None:
        self.tokens = np.random.default_rng(n).integers(0, VOCABULARY, n).astype(np.uint16)
        self.n_bytes, self.n_chars = 3 * n, 2 * n


def run(model: nn.Module, text: Text, **given: Any) -> dict[str, float]:
    settings: dict[str, Any] = {"sequence_length": 5, "rows": 4, "device": CPU, "precision": PrecisionConfig()}
    return evaluate(model, text, objective=LanguageModel(), **{**settings, **given})


@torch.no_grad()
def brute_force(model: nn.Module, tokens: np.ndarray, context_starts: list[int]) -> tuple[float, float]:
    """Mean loss and accuracy, each target scored in a forward pass of its own over the tokens since its start."""
    model.eval()
    nll, correct = [], 0
    for target in range(1, len(tokens)):
        start = max(s for s in context_starts if s < target)
        logits, _ = model(torch.from_numpy(tokens[start:target].astype(np.int64))[None], None)
        log_p = logits[0, -1].double().log_softmax(-1)
        nll.append(-log_p[int(tokens[target])].item())
        correct += int(log_p.argmax()) == int(tokens[target])
    return math.fsum(nll) / len(nll), correct / len(nll)


@pytest.mark.parametrize("n", [2, 5, 6, 7, 41, 48])
@pytest.mark.parametrize("rows", [1, 4])
def test_every_token_is_scored_once_with_the_context_of_its_window(n: int, rows: int) -> None:
    text = Text(n)
    loss, accuracy = brute_force(Causal(), text.tokens, list(range(0, n, 5)))
    got = run(Causal(), text, rows=rows)
    assert got["val/tokens"] == n - 1
    assert got["val/loss"] == pytest.approx(loss, rel=1e-6)
    assert got["val/accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert got["val/perplexity"] == math.exp(got["val/loss"])
    if n == 41:  # negative control: windows that start elsewhere are seen
        assert brute_force(Causal(), text.tokens, list(range(0, n, 4)))[0] != pytest.approx(loss, rel=1e-6)


def test_a_model_with_state_reads_the_text_in_one_go() -> None:
    text = Text(48)
    loss, _ = brute_force(Recurrent(), text.tokens, [0])
    assert run(Recurrent(), text, rows=1)["val/loss"] == pytest.approx(loss, rel=1e-6)
    forgetful, _ = brute_force(Recurrent(), text.tokens, list(range(0, 48, 5)))
    assert forgetful != pytest.approx(loss, rel=1e-6)


def test_rows_of_a_model_with_state_are_contiguous_stretches() -> None:
    # 47 targets in 10 windows of 5; 4 rows of 3 windows start at tokens 0, 15, 30 and 45
    text = Text(48)
    loss, _ = brute_force(Recurrent(), text.tokens, [0, 15, 30, 45])
    assert run(Recurrent(), text, rows=4)["val/loss"] == pytest.approx(loss, rel=1e-6)


def test_bits_are_counted_over_the_share_of_text_that_is_scored() -> None:
    text = Text(41)
    whole, part = run(Causal(), text), run(Causal(), text, max_tokens=17)
    for got in (whole, part):  # 3 bytes and 2 characters a token, whatever the part
        assert got["val/bits_per_byte"] == pytest.approx(got["val/loss"] / math.log(2) / 3)
        assert got["val/bits_per_character"] == pytest.approx(got["val/loss"] / math.log(2) / 2)
    assert part["val/tokens"] == 17
    first = Text(41)
    first.tokens = first.tokens[:18]
    assert part["val/loss"] == run(Causal(), first)["val/loss"]


def test_dropout_is_off_and_modes_and_generators_are_put_back() -> None:
    model = Causal().train()
    model.query.eval()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = run(model, Text(41))
    assert torch.equal(torch.rand(3), expected)
    assert model.training and model.dropout.training and not model.query.training
    assert run(model, Text(41)) == first


def test_a_model_that_draws_leaves_the_generator_alone() -> None:
    class Noisy(Causal):
        def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
            torch.rand(1)
            return super().forward(tokens, state)

    model = Noisy()
    before = torch.get_rng_state()
    run(model, Text(41))
    assert torch.equal(torch.get_rng_state(), before)
    model(torch.zeros(1, 2, dtype=torch.int64))
    assert not torch.equal(torch.get_rng_state(), before)


def test_perplexity_is_infinite_from_twenty_nats_on() -> None:
    model = Causal()
    with torch.no_grad():
        model.head.weight.mul_(1e4)
    assert run(model, Text(41))["val/perplexity"] == math.inf


def test_a_text_without_a_target_is_refused() -> None:
    for n in (0, 1):
        with pytest.raises(DataError, match="at least 2"):
            run(Causal(), Text(n))
