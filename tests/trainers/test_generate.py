"""Laws of text generation: what the sampler keeps, that batches and caches do not show, where texts end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainers.config import ModelConfig
from trainers.errors import UserError
from trainers.generate import GenerateConfig, find_stop, generate, held_back, stream
from trainers.models import GPT, State, build_model
from trainers.models.reading import StateReader, WindowReader, open_reader, window_start
from trainers.sampling import choose, keep_top_k, keep_top_p, penalise_repetition

ALPHABET = "\nabcdefghijklmnopqrstuvwxyz"
LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 3.0])


class Letters:
    """Characters of a small alphabet; an end-of-text token where asked."""

    kind = "characters"
    fingerprint = "letters"
    pad_id = None

    def __init__(self, eos: bool = False) -> None:
        self.eos_id = len(ALPHABET) if eos else None
        self.vocab_size = len(ALPHABET) + eos

    def encode(self, text: str) -> np.ndarray:
        return np.array([ALPHABET.index(letter) for letter in text], dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(ALPHABET[i] for i in ids if i < len(ALPHABET))

    def save(self, directory: Path) -> None:
        raise NotImplementedError


class Bytes(Letters):
    """UTF-8 bytes, so that a character may lie across tokens."""

    def __init__(self) -> None:
        self.eos_id = None
        self.vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")


class Reciting(nn.Module):
    """Writes a fixed list of tokens over and over; its state counts how far it has come."""

    def __init__(self, ids: Sequence[int], vocab_size: int, prompt_length: int) -> None:
        super().__init__()
        self.ids, self.vocab_size, self.prompt_length = list(ids), vocab_size, prompt_length

    def initial_state(self, rows: int) -> State:
        return {"read": torch.zeros(rows, dtype=torch.long)}

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        assert state is not None
        ends = state["read"][:, None] + torch.arange(1, tokens.shape[1] + 1)
        wanted = torch.tensor(self.ids)[(ends - self.prompt_length) % len(self.ids)]
        return 100.0 * nn.functional.one_hot(wanted, self.vocab_size), {"read": ends[:, -1]}


class Gru(nn.Module):
    """A small model with runtime state."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 16)
        self.cell = nn.GRU(16, 16, batch_first=True)
        for weight in self.cell.parameters():
            nn.init.normal_(weight)
        self.head = nn.Linear(16, vocab_size)

    def initial_state(self, rows: int) -> State:
        return {"hidden": torch.zeros(rows, 16)}

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = state or self.initial_state(tokens.shape[0])
        out, hidden = self.cell(self.embedding(tokens), state["hidden"][None])
        return self.head(out) * 8, {"hidden": hidden[0]}


class Uncached(nn.Module):
    """A GPT of which only the forward pass is known."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt, self.context_length = gpt, gpt.context_length

    def initial_state(self, rows: int) -> None:
        return None

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        return self.gpt(tokens)


def gpt(positions: str = "learned", vocab_size: int = len(ALPHABET), **changes: object) -> GPT:
    """A model whose greedy text does not settle on one letter."""
    settings = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "context_length": 12,
        "positions": positions,
        "dropout": 0.2,
    }
    torch.manual_seed(4)
    model = build_model(ModelConfig.model_validate(settings | changes), vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(logits: Tensor) -> list[int]:
    return torch.isfinite(logits).nonzero().flatten().tolist()


# ---- one token ----------------------------------------------------------------------------------------


def test_top_k_keeps_exactly_the_k_largest() -> None:
    assert kept(keep_top_k(LOGITS, 1)) == [4]
    assert kept(keep_top_k(LOGITS, 3)) == [0, 2, 4]
    assert kept(keep_top_k(LOGITS, 9)) == [0, 1, 2, 3, 4]
    assert kept(keep_top_k(torch.zeros(5), 2)) == [0, 1]
    assert torch.equal(keep_top_k(LOGITS, 3)[[0, 2, 4]], LOGITS[[0, 2, 4]])


def test_top_p_keeps_the_prefix_with_the_token_that_crosses() -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    assert kept(keep_top_p(logits, 0.01)) == [1]
    assert kept(keep_top_p(logits, 0.49)) == [1]
    assert kept(keep_top_p(logits, 0.6)) == [1, 3]
    assert kept(keep_top_p(logits, 0.9)) == [0, 1, 3]
    assert kept(keep_top_p(logits, 1.0)) == [0, 1, 2, 3]


@pytest.mark.parametrize("p", [0.1, 0.35, 0.62, 0.9, 0.99])
def test_top_p_is_the_shortest_prefix_that_reaches_p(p: float) -> None:
    for seed in range(20):
        logits = torch.randn(30, generator=generator(seed)) * 2
        probabilities = torch.softmax(logits.double(), 0)
        inside = probabilities[kept(keep_top_p(logits, p))]
        assert inside.sum() >= p
        assert inside.sum() - inside.min() < p


def test_repetition_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    seen = torch.tensor([True, False, False, True, False])
    assert penalise_repetition(LOGITS, seen, 2.0).tolist() == [1.0, 0.5, 1.0, -2.0, 3.0]
    assert penalise_repetition(LOGITS, seen, 0.5).tolist() == [4.0, 0.5, 1.0, -0.5, 3.0]


def test_the_filters_combine() -> None:
    seen = torch.tensor([False, False, False, False, True])
    config = GenerateConfig(temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=10.0)
    draws = {choose(LOGITS, seen, config, generator(seed)) for seed in range(200)}
    # the penalty takes 4 from 3.0 to 0.3; top-k leaves 0, 2, 1; of their 0.84, 0.11, 0.04 top-p leaves two
    assert draws == {0, 2}
    assert {choose(LOGITS, seen, GenerateConfig(), generator(seed)) for seed in range(200)} > draws


def test_frequencies_follow_the_tempered_softmax() -> None:
    config, seen, source = GenerateConfig(temperature=1.5), torch.zeros(5, dtype=torch.bool), generator()
    draws = torch.tensor([choose(LOGITS, seen, config, source) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=5) / 4000
    assert torch.allclose(shares, torch.softmax(LOGITS / 1.5, 0), atol=0.03)
    assert not torch.allclose(shares, torch.softmax(LOGITS / 0.8, 0), atol=0.03)


def test_top_k_of_one_is_argmax_and_draws_nothing() -> None:
    source = generator()
    before = source.get_state()
    ties = torch.tensor([1.0, 3.0, 3.0])
    assert choose(ties, torch.zeros(3, dtype=torch.bool), GenerateConfig(top_k=1), source) == 1
    assert torch.equal(before, source.get_state())
    choose(ties, torch.zeros(3, dtype=torch.bool), GenerateConfig(top_k=2), source)
    assert not torch.equal(before, source.get_state())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0.*top_k=1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ("x", "")}, "stop"),
        ({"stop": "end"}, "stop"),
    ],
)
def test_bad_settings_are_named(setting: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerateConfig(**setting)  # type: ignore[arg-type]


def test_a_diverged_model_says_so() -> None:
    model = gpt()
    with torch.no_grad():
        model.embedding.weight[3, 0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        generate(model, Letters(), ["abc"], GenerateConfig())


# ---- whole texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "rope_interleaved"])
def test_top_k_of_one_equals_a_greedy_loop_without_cache_past_the_context(positions: str) -> None:
    model, letters = gpt(positions).eval(), Letters()
    ids = letters.encode("hello").tolist()
    for _ in range(40):
        window = ids[window_start(len(ids), 12) :]
        ids.append(int(model(torch.tensor([window]))[0][0, -1].argmax()))
    text = generate(model, letters, ["hello"], GenerateConfig(max_tokens=40, top_k=1))[0]
    assert text == letters.decode(ids[5:])
    assert len(set(text)) > 1  # a text of one letter would prove little


def test_prompts_of_unequal_length_come_out_as_if_alone() -> None:
    model, letters = gpt("rope"), Letters()
    prompts = ["a", "the quick brown fox jumps over".replace(" ", "\n"), "", "zebra"]
    greedy = GenerateConfig(max_tokens=30, top_k=1)
    together = generate(model, letters, prompts, greedy)
    assert together == [generate(model, letters, [prompt], greedy)[0] for prompt in prompts]
    assert len(set(together)) == 4
    drawn = GenerateConfig(max_tokens=30)
    assert generate(model, letters, prompts, drawn)[3] == generate(model, letters, ["q", "q", "q", "zebra"], drawn)[3]


def test_many_prompts_are_written_in_order() -> None:
    model, letters = gpt(), Letters()
    prompts = [ALPHABET[1 + i % 26] * (1 + i % 5) for i in range(20)]
    greedy = GenerateConfig(max_tokens=3, top_k=1)
    texts = generate(model, letters, prompts, greedy)
    assert texts == [generate(model, letters, [prompt], greedy)[0] for prompt in prompts]
    assert generate(model, letters, [], greedy) == []


def test_a_seed_fixes_the_text_and_no_global_generator_moves() -> None:
    model, letters = gpt(), Letters()
    before = torch.get_rng_state()
    first, again, other = (
        generate(model, letters, ["abc", "abc"], GenerateConfig(max_tokens=25, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first[0] != first[1]  # each prompt draws from its own stream
    assert torch.equal(before, torch.get_rng_state())


def test_the_model_returns_to_its_own_mode_and_dropout_is_off() -> None:
    model, letters = gpt().train(), Letters()
    model.blocks[1].eval()
    config = GenerateConfig(max_tokens=10)
    trained = generate(model, letters, ["abc"], config)
    assert model.training and model.blocks[0].ffn.training and not model.blocks[1].ffn.training
    assert trained == generate(model.eval(), letters, ["abc"], config)
    pieces = stream(model.train(), letters, "abc", config)
    next(pieces)
    assert model.training  # between two pieces too


@pytest.mark.parametrize("stop", [(), ("qzq",), ("e", "ab")])
def test_a_stream_is_the_text_in_pieces(stop: tuple[str, ...]) -> None:
    model, letters = gpt(), Letters()
    config = GenerateConfig(max_tokens=60, temperature=2.0, stop=stop)
    pieces = list(stream(model, letters, "abc", config))
    assert "".join(pieces) == generate(model, letters, ["abc"], config)[0]
    assert all(pieces)


def test_a_cache_and_a_whole_window_write_the_same() -> None:
    model, letters = gpt("rope"), Letters()
    config = GenerateConfig(max_tokens=40)
    assert isinstance(open_reader(Uncached(model), 1), WindowReader)
    assert generate(Uncached(model), letters, ["abc", "xyzzy"], config) == generate(
        model, letters, ["abc", "xyzzy"], config
    )


def test_models_with_state_are_stepped() -> None:
    torch.manual_seed(0)
    model, letters = Gru(len(ALPHABET)).double(), Letters()
    model.initial_state = lambda rows: {"hidden": torch.zeros(rows, 16, dtype=torch.float64)}  # type: ignore[method-assign]
    assert isinstance(open_reader(model, 1), StateReader)
    ids = letters.encode("hello").tolist()
    for _ in range(20):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))  # the whole text each time
    texts = generate(model, letters, ["x", "hello"], GenerateConfig(max_tokens=20, top_k=1))
    assert texts[1] == letters.decode(ids[5:])
    assert texts[0] != texts[1]


def test_a_table_larger_than_the_tokenizer_never_yields_unknown_ids() -> None:
    letters = Letters()
    text = generate(gpt(vocab_size=200), letters, ["abc"], GenerateConfig(max_tokens=200, temperature=50.0))[0]
    assert len(text) == 200  # an id beyond the alphabet would decode to nothing


# ---- beginnings and ends ------------------------------------------------------------------------------


def recite(text: str, tokenizer: Letters, **settings: object) -> str:
    model = Reciting(tokenizer.encode(text).tolist(), tokenizer.vocab_size, prompt_length=1)
    config = GenerateConfig(**({"max_tokens": 30, "top_k": 1} | settings))  # type: ignore[arg-type]
    (written,) = generate(model, tokenizer, ["a"], config)
    assert written == "".join(stream(model, tokenizer, "a", config))
    return written


def test_texts_end_before_the_first_stop_sequence_though_it_lies_across_tokens() -> None:
    letters = Letters()
    assert recite("thequickbrownfox", letters, stop=("brown",)) == "thequick"
    assert recite("thequickbrownfox", letters, stop=("fox", "own")) == "thequickbr"
    assert recite("aabaac", letters, stop=("aac",)) == "aab"
    assert recite("thequickbrownfox", letters, stop=("wolf",), max_tokens=18) == "thequickbrownfoxth"
    assert recite("thequickbrownfox", letters, stop=("xtz",), max_tokens=18) == "thequickbrownfoxth"


def test_max_tokens_counts_new_tokens() -> None:
    assert recite("abc", Letters(), max_tokens=1) == "a"
    assert recite("abc", Letters(), max_tokens=7) == "abcabca"


def test_characters_of_several_bytes_come_out_whole() -> None:
    assert recite("größe 猫 ", Bytes(), max_tokens=13) == "größe 猫 g"
    assert recite("größe 猫 ", Bytes(), stop=("猫",)) == "größe "
    model = Reciting(Bytes().encode("ö猫").tolist(), 256, prompt_length=1)
    assert list(stream(model, Bytes(), "a", GenerateConfig(max_tokens=5, top_k=1))) == ["ö", "猫"]
    assert recite("猫", Bytes(), max_tokens=2) == "\N{REPLACEMENT CHARACTER}"  # cut inside: shown, not lost


def test_the_end_of_text_token_ends_the_text() -> None:
    letters = Letters(eos=True)
    model = Reciting([3, 4, letters.eos_id, 5], letters.vocab_size, prompt_length=1)
    assert generate(model, letters, ["a"], GenerateConfig(top_k=1)) == ["cd"]
    assert generate(model, Letters(), ["a"], GenerateConfig(top_k=1, max_tokens=4))[0][:2] == "cd"


def test_an_empty_prompt_starts_from_the_end_of_text_else_from_a_newline() -> None:
    greedy = GenerateConfig(max_tokens=10, top_k=1)
    model, letters, documents = gpt(vocab_size=len(ALPHABET) + 1), Letters(), Letters(eos=True)
    assert generate(model, letters, [""], greedy) == generate(model, letters, ["\n"], greedy)
    reader = open_reader(model.eval(), 1)
    with torch.no_grad():
        first = int(reader.read([[documents.eos_id]])[0].argmax())
    assert generate(model, documents, [""], greedy)[0].startswith(documents.decode([first]))


def test_stop_search_and_hold_back() -> None:
    assert find_stop("one two", ("two", "e")) == 2
    assert find_stop("one two", ("three",)) is None
    assert held_back("abcEN", ("END",)) == 2
    assert held_back("abcE", ("END", "bcEx")) == 3
    assert held_back("abc", ("END",)) == 0
