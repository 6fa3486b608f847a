"""Training and validation text are disjoint and together the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.config import SourceConfig, SplitConfig
from trainers.data.corpora import Corpus, open_corpus
from trainers.data.pieces import Piece, utf8_length, whole_documents
from trainers.data.splits import Extent, is_held_out, measure, training, validation
from trainers.errors import DataError

DOCUMENTS = [f"{number} {'日x' * (number % 9)}\n" for number in range(60)]


class Texts:
    """As much of a corpus as a split reads, cut into pieces of `size` characters."""

    name, size_bytes = "texts", None

    def __init__(self, documents: list[str], size: int = 1 << 20) -> None:
        self._documents, self._size = documents, size

    def pieces(self):
        for text in self._documents:
            for start in range(0, len(text), self._size):
                yield Piece(text[start : start + self._size], start + self._size >= len(text))


def text_of(pieces: object) -> str:
    return "".join(piece.text for piece in pieces)


@given(
    st.lists(st.text("ab日\n", min_size=1, max_size=30), min_size=1, max_size=8),
    st.floats(0.01, 0.99),
    st.integers(1, 9),
)
def test_the_tail_is_what_the_front_leaves(documents: list[str], fraction: float, size: int) -> None:
    corpus, whole = Texts(documents, size), "".join(documents)
    split = SplitConfig(method="tail", fraction=fraction)
    if int(len(whole) * (1 - fraction)) == 0:
        with pytest.raises(DataError, match="0 characters would be left to train on"):
            measure(corpus, split)
        return
    extent = measure(corpus, split)
    front, tail = text_of(training(corpus, extent)), text_of(validation(corpus, extent))
    assert (front + tail, len(front)) == (whole, int(len(whole) * (1 - fraction)))
    assert (extent.n_chars, extent.n_bytes, extent.n_documents) == (len(whole), utf8_length(whole), len(documents))
    assert extent.train_bytes == utf8_length(front)
    ends = [piece.ends_document for piece in training(corpus, extent)]
    assert extent.train_documents == sum(ends)


@given(st.lists(st.text("ab日\n", min_size=1, max_size=30), min_size=1, max_size=40), st.integers(1, 9))
def test_by_hash_every_document_stands_on_one_side_whatever_else_there_is(documents: list[str], size: int) -> None:
    corpus, split = Texts(documents, size), SplitConfig(method="hash", fraction=0.5)
    held_out = [text for text in documents if is_held_out(text, 0.5)]
    kept = [text for text in documents if not is_held_out(text, 0.5)]
    if not held_out or not kept:
        with pytest.raises(DataError, match="0 documents would be"):
            measure(corpus, split)
        return
    extent = measure(corpus, split)
    assert list(whole_documents(training(corpus, extent))) == kept
    assert list(whole_documents(validation(corpus, extent))) == held_out
    assert not set(kept) & set(held_out)
    assert (extent.train_chars, extent.train_documents) == (sum(map(len, kept)), len(kept))
    assert extent.train_bytes == sum(map(utf8_length, kept))


def test_a_larger_fraction_holds_out_more_of_the_same() -> None:
    tenth = {text for text in DOCUMENTS if is_held_out(text, 0.1)}
    third = {text for text in DOCUMENTS if is_held_out(text, 0.33)}
    assert tenth < third
    assert 0 < len(tenth) < 15
    assert is_held_out("a text", 0.99)
    # The rule is written into runs that exist: this hash must never change.
    assert [n for n, text in enumerate(DOCUMENTS) if is_held_out(text, 0.1)] == [
        n for n, text in enumerate(DOCUMENTS) if int(_sha(text)[:16], 16) / 2**64 < 0.1
    ]


def _sha(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def test_one_document_cannot_be_split_by_hash() -> None:
    with pytest.raises(DataError, match="method=tail"):
        measure(Texts(["one"]), SplitConfig(method="hash", fraction=0.5))


@pytest.mark.parametrize("write", [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"\xef\xbb\xbf")])
def test_nothing_to_split_is_refused(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "a.txt")
    with pytest.raises(DataError, match="empty"):
        _measured(tmp_path / "a.txt")


def _measured(path: Path) -> tuple[Corpus, Extent]:
    corpus = open_corpus(SourceConfig(corpus=str(path)))
    return corpus, measure(corpus, SplitConfig())


def test_the_cut_of_a_jsonl_may_divide_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    corpus, extent = _measured(tmp_path / "a.jsonl")
    front, tail = list(training(corpus, extent)), list(validation(corpus, extent))
    assert text_of(front) + text_of(tail) == "".join(DOCUMENTS)
    assert sum(piece.ends_document for piece in [*front, *tail]) == len(DOCUMENTS)
