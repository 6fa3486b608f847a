"""Text goes through a tokenizer and comes back; what is trained twice is the same; what is saved is what is loaded."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.config import TokenizerConfig
from trainers.data.pieces import chunks, document_pieces
from trainers.data.tokenizers import MANIFEST, SPECIALS, CharacterTokenizer, load_tokenizer, train_tokenizer
from trainers.data.types import Tokenizer
from trainers.errors import DataError

CODE = "def f(x):\n    if x:\n\treturn  'naïve 日本'  # <EOS> is text here\n\n\n" * 20
PROSE = "It is a truth universally acknowledged, that a single man must be in want of a wife. 1813 ... don't!\n" * 20
TRAINED = {"bpe": "tokenizers", "sentencepiece_bpe": "sentencepiece", "sentencepiece_unigram": "sentencepiece"}
KINDS = ["characters", "bytes", *TRAINED]
LOSSLESS = ["bytes", *TRAINED]


@cache
def trained(kind: str) -> Tokenizer:
    library = TRAINED.get(kind)
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    vocab_size = 400 if library else None
    return train_tokenizer(TokenizerConfig(kind=kind, vocab_size=vocab_size), [CODE, PROSE])


@pytest.mark.parametrize("kind", KINDS)
def test_whitespace_newlines_and_indentation_survive(kind: str) -> None:
    tokenizer = trained(kind)
    for text in [CODE, PROSE, "", "\n", " ", "    x", "x  ", "\n\n  \n", "a\tb"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=60)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0\u2581")))
def test_any_text_survives(kind: str, text: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & {tokenizer.pad_id, tokenizer.eos_id}  # whatever is written, no special comes of it


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.sampled_from("ab .,\n\t don'5日<EOS>"), max_size=300), limit=st.integers(8, 60))
def test_encoding_a_document_in_chunks_is_encoding_it_whole(kind: str, text: str, limit: int) -> None:
    tokenizer = trained(kind)
    parts = [chunk.text for chunk in chunks(document_pieces(text), limit)]
    if any(part and text[len("".join(parts[: i + 1])) - 1].isspace() for i, part in enumerate(parts[:-1])):
        return  # cut at the limit, inside a run of spaces
    if any(" " not in part and "\n" not in part for part in parts[1:]):
        return  # cut at the limit, inside a word
    joined = np.concatenate([*tokenizer.encode_batch(parts), np.zeros(0, dtype=np.int32)])
    assert joined.tolist() == tokenizer.encode(text).tolist()


def test_a_cut_anywhere_would_change_the_tokens() -> None:
    """The control of the law above: it is where the cut falls that makes it hold."""
    tokenizer = trained("bpe")
    halves = [PROSE[at - 4 : at] for at in range(4, len(PROSE), 4)]
    assert sum(map(len, tokenizer.encode_batch(halves))) > len(tokenizer.encode(PROSE))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_is_loaded(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for name in ("kind", "vocab_size", "pad_id", "eos_id", "fingerprint"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.encode(CODE).tolist() == tokenizer.encode(CODE).tolist()
    assert loaded.decode(loaded.encode(CODE)) == CODE


@pytest.mark.parametrize("kind", TRAINED)
def test_training_twice_gives_the_same_tokenizer(kind: str) -> None:
    config = TokenizerConfig(kind=kind, vocab_size=400)
    assert train_tokenizer(config, [CODE, PROSE]).fingerprint == trained(kind).fingerprint
    assert train_tokenizer(config, [CODE]).fingerprint != trained(kind).fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_ids_beyond_the_vocabulary_and_specials_decode_to_nothing(kind: str) -> None:
    tokenizer = trained(kind)
    ids = [tokenizer.eos_id, *tokenizer.encode("single man").tolist(), tokenizer.pad_id, tokenizer.vocab_size + 7]
    assert tokenizer.decode(ids) == "single man"


def test_characters_are_numbered_behind_the_specials_and_unknown_ones_are_said() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(), ["cab", "a"])
    assert (SPECIALS, tokenizer.vocab_size) == (("<PAD>", "<UNK>", "<BOS>", "<EOS>"), 7)
    assert tokenizer.encode("abc").tolist() == [4, 5, 6]
    assert tokenizer.encode("a!日\U0010ffff").tolist() == [4, 1, 1, 1]
    assert tokenizer.decode([2, 4, 1, 3]) == "a<UNK>"
    assert train_tokenizer(TokenizerConfig(min_frequency=2), ["cab", "a"]).vocab_size == 5


def test_the_first_ids_are_the_specials_everywhere() -> None:
    for kind in TRAINED:
        assert (trained(kind).pad_id, trained(kind).eos_id) == (0, 3)


def test_a_tokenizer_changed_after_saving_is_refused(tmp_path: Path) -> None:
    CharacterTokenizer("abc").save(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 7
    CharacterTokenizer("abd").save(tmp_path / "other")
    (tmp_path / "characters.json").write_text((tmp_path / "other" / "characters.json").read_text())
    with pytest.raises(DataError, match="changed after it was saved"):
        load_tokenizer(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"kind": "morse"}))
    with pytest.raises(DataError, match="no tokenizer of kind 'morse'"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no tokenizer here"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", TRAINED)
def test_a_tokenizer_file_is_loaded_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    tokenizer.save(tmp_path)
    (path,) = (file for file in tmp_path.iterdir() if file.name != MANIFEST)
    loaded = train_tokenizer(TokenizerConfig(kind=kind, path=str(path)), ())
    assert loaded.fingerprint == tokenizer.fingerprint
    path.write_bytes(b"not a model")
    for wrong in (path, tmp_path / "missing"):
        with pytest.raises(DataError, match=wrong.name):
            train_tokenizer(TokenizerConfig(kind=kind, path=str(wrong)), ())


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "sentencepiece_unigram"])
def test_a_vocabulary_too_small_for_sentencepiece_is_refused_with_the_least_that_does(kind: str) -> None:
    with pytest.raises(DataError, match="Set it to at least") as caught:
        train_tokenizer(TokenizerConfig(kind=kind, vocab_size=100), [CODE])
    least = int(str(caught.value).split("at least ")[1].rstrip("."))
    assert train_tokenizer(TokenizerConfig(kind=kind, vocab_size=least + 1), [CODE]).vocab_size <= least + 1


def test_progress_is_told_in_bytes() -> None:
    told: list[tuple[int, int, str]] = []
    train_tokenizer(TokenizerConfig(), ["ab", "日"], lambda *one: told.append(one), 5)
    assert told[-1] == (5, 5, "building the tokenizer")
