"""What of a corpus is trained on and what is held out: two disjoint parts that together are the whole text."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from trainers.config import SplitConfig
from trainers.data.corpora import Corpus
from trainers.data.pieces import Piece, utf8_length
from trainers.data.progress import Progress, Throttled, silent
from trainers.errors import DataError


@dataclass(frozen=True)
class Extent:
    """The size of a corpus' text and where its split falls. Bytes are of UTF-8 with newlines as \\n."""

    n_chars: int
    n_bytes: int
    n_documents: int
    train_chars: int
    """tail: the characters in front of the cut; hash: those of the training documents"""
    train_bytes: int
    train_documents: int
    """documents that end in the training part"""
    held_out: np.ndarray | None
    """hash: bool, one a document"""


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation part under the `hash` method.

    The first 64 bits of the sha256 of its UTF-8 text against `fraction`: the same everywhere and for ever, equal
    documents on the same side, and a larger fraction holds out a superset.
    """
    return _below(hashlib.sha256(text.encode()).digest(), fraction)


def _below(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def measure(corpus: Corpus, split: SplitConfig, progress: Progress = silent) -> Extent:
    """Reads the corpus once and says where its split falls.

    tail: training is the first int((1 - fraction) * characters) of the corpus, its documents in order, and the
    document that the cut falls into is divided. hash: every document by `is_held_out`.

    Raises:
        DataError: nothing is left on one side.
    """
    reporter = Throttled(progress, corpus.size_bytes or 0, f"reading {corpus.name}")
    sizes, ends, held_out = array("q"), bytearray(), bytearray()  # 17 bytes a piece: there may be millions of documents
    digest = hashlib.sha256()
    for piece in corpus.pieces():
        sizes.extend((len(piece.text), utf8_length(piece.text)))
        ends.append(piece.ends_document)
        if split.method == "hash":
            digest.update(piece.text.encode())
            if piece.ends_document:
                held_out.append(_below(digest.digest(), split.fraction))
                digest = hashlib.sha256()
        reporter.add(piece.stored)
    reporter.finish()
    table, last = np.frombuffer(sizes, dtype=np.int64).reshape(-1, 2), np.frombuffer(ends, dtype=bool)
    n_chars, n_bytes = (int(total) for total in table.sum(axis=0))
    if n_chars == 0:
        raise DataError(f"{corpus.name} is empty: it holds no text to train on.")
    if split.method == "tail":
        train_chars = int(n_chars * (1 - split.fraction))
        train_bytes = _bytes_before(corpus, table, train_chars)
        _both_sides(corpus, split, train_chars, n_chars - train_chars, "characters", n_chars)
        train_documents = int(last[np.cumsum(table[:, 0]) <= train_chars].sum())
        return Extent(n_chars, n_bytes, int(last.sum()), train_chars, train_bytes, train_documents, None)
    apart = np.frombuffer(held_out, dtype=bool)
    _both_sides(corpus, split, int((~apart).sum()), int(apart.sum()), "documents", len(apart))
    document = np.concatenate([[0], np.cumsum(last)[:-1]])  # of each piece
    trained_on = ~apart[document]
    train_chars, train_bytes = (int(table[:, column].sum(where=trained_on)) for column in (0, 1))
    return Extent(n_chars, n_bytes, len(apart), train_chars, train_bytes, int((~apart).sum()), apart)


def _bytes_before(corpus: Corpus, table: np.ndarray, train_chars: int) -> int:
    """UTF-8 bytes in front of the cut; the piece it falls into is read again where it is not ASCII."""
    ends = np.cumsum(table[:, 0])
    whole = int(np.searchsorted(ends, train_chars, side="right"))  # pieces before that one
    before, within = int(table[:whole, 1].sum()), train_chars - (int(ends[whole - 1]) if whole else 0)
    if within == 0 or table[whole, 0] == table[whole, 1]:
        return before + within
    return before + utf8_length(next(islice(corpus.pieces(), whole, None)).text[:within])


def _both_sides(corpus: Corpus, split: SplitConfig, train: int, held_out: int, unit: str, total: int) -> None:
    if train and held_out:
        return
    side = "held out for validation" if not held_out else "left to train on"
    way_out = "Use more text, or another data.validation.fraction"
    if split.method == "hash":
        way_out += ", or data.validation.method=tail, which divides documents"
    raise DataError(
        f"{corpus.name}: data.validation (method {split.method}, fraction {split.fraction}) of its {total} {unit}: "
        f"0 {unit} would be {side}. {way_out}."
    )


def training(corpus: Corpus, extent: Extent) -> Iterator[Piece]:
    """The text that may be trained on."""
    if extent.held_out is not None:
        yield from _documents_where(corpus, ~extent.held_out)
        return
    left = extent.train_chars
    for piece in corpus.pieces():
        if len(piece.text) <= left:
            yield piece
            left -= len(piece.text)
        elif left:
            yield Piece(piece.text[:left], False, piece.stored)
            return
        if not left:
            return


def validation(corpus: Corpus, extent: Extent) -> Iterator[Piece]:
    """The text that is held out: all that `training` leaves."""
    if extent.held_out is not None:
        yield from _documents_where(corpus, extent.held_out)
        return
    left = extent.train_chars
    for piece in corpus.pieces():
        if left >= len(piece.text):
            left -= len(piece.text)
            continue
        yield Piece(piece.text[left:], piece.ends_document, piece.stored) if left else piece
        left = 0


def _documents_where(corpus: Corpus, wanted: np.ndarray) -> Iterator[Piece]:
    document = 0
    for piece in corpus.pieces():
        if wanted[document]:
            yield piece
        document += piece.ends_document
