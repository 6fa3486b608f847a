"""A corpus that trains while it downloads: tokenised on the fly, shuffled by us, resumed exactly.

The training documents of the split, each followed by the end-of-text token where there is one, make one endless
sequence of tokens: behind the last document the first comes again (a new epoch). Row i is the S + 1 tokens from i * S
on. Rows are shuffled in blocks of `data.stream_block` by a keyed permutation of (seed, phase, source, block), so the
k-th row of the stream is arithmetic once its block is there, and a block can be rebuilt from where its first token
stands: the epoch, the position before its document, and the token inside that document.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from trainers.config import DataConfig, SourceConfig
from trainers.data.ahead import Ahead
from trainers.data.hub import HubText, Position, open_text
from trainers.data.permutation import permutation
from trainers.data.splits import is_held_out
from trainers.data.types import Tokenizer
from trainers.errors import DataError

GROUP = 32  # documents tokenised in one call


@dataclass(frozen=True)
class StreamedSource:
    """A Hub dataset to train on as it arrives. Opening it costs nothing until rows are asked for."""

    text: HubText
    tokenizer: Tokenizer
    block_rows: int
    """rows shuffled among themselves"""
    held_out: float
    """share of the documents that is kept for validation, by hash"""

    @property
    def revision(self) -> str:
        """The commit that is read: what the fingerprint covers."""
        return self.text.revision

    def open(self, length: int, *key: int | str) -> StreamReader:
        """A reader of rows of `length` + 1 tokens whose shuffle depends on `key`: (seed, phase, source)."""
        return StreamReader(self, length, key)


def open_stream(
    source: SourceConfig, tokenizer: Tokenizer, data: DataConfig, revision: str | None = None
) -> StreamedSource:
    """The streaming corpus `source` of `data`, pinned to one commit (`revision`, or what the Hub has now).

    Raises:
        DataError: the Hub does not know it or cannot be reached.
    """
    return StreamedSource(open_text(source, revision), tokenizer, data.stream_block, data.validation.fraction)


@dataclass(frozen=True)
class Block:
    index: int
    state: dict[str, Any]
    """where its first token stands; JSON"""
    rows: np.ndarray
    """int32 (block_rows, S + 1), in the order of the text"""


class StreamReader:
    """The rows of a stream by their number, read forwards; one block in use and at most one being made."""

    count: None = None

    def __init__(self, source: StreamedSource, length: int, key: tuple[int | str, ...]) -> None:
        self._source, self._length, self._key = source, length, key
        self._state = _start(source)
        self._begin()

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        """int32 (k, S + 1): the rows with these numbers.

        Args:
            rows: int64 (k,), ascending, none before the block that the call before ended in
        Raises:
            DataError: the corpus cannot be read, or holds no training text.
        """
        blocks, places = np.divmod(rows, self._source.block_rows)
        fetched = np.empty((len(rows), self._length + 1), dtype=np.int32)
        for index in np.unique(blocks).tolist():
            here = blocks == index
            block = self._advance(index)
            shuffle = permutation(self._source.block_rows, *self._key, "block", index)
            fetched[here] = block.rows[shuffle(places[here])]
        return fetched

    def state(self) -> dict[str, Any]:
        """Where the block in use begins; JSON of constant size."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on with the block that `state` names.

        Raises:
            DataError: the state is of another commit of the dataset.
        """
        if state["revision"] != self._source.revision:
            raise DataError(
                f"this run has read {self._source.text.source.corpus} at commit {state['revision']}, but the source "
                f"is now at {self._source.revision}. Set revision={state['revision']} on this source to go on."
            )
        self.close()
        self._state = state
        self._begin()

    def close(self) -> None:
        """Ends the background thread."""
        self._stop.set()
        self._ahead.close()

    def _begin(self) -> None:
        self._stop = threading.Event()
        self._block: Block | None = None
        self._ahead = Ahead(_blocks(self._source, self._length, self._state, self._stop))

    def _advance(self, index: int) -> Block:
        """The block `index`; those before it are passed over."""
        assert index >= self._state["block"], "a stream is read forwards: restore an earlier state to go back"
        while self._block is None or self._block.index < index:
            self._block = self._ahead.take()
            self._state = self._block.state
        return self._block


@dataclass(frozen=True)
class Piece:
    """What is left of one document."""

    tokens: np.ndarray
    epoch: int
    before: Position
    """the position before the document"""
    skipped: int
    """tokens of the document in front of `tokens`"""


def _start(source: StreamedSource) -> dict[str, Any]:
    return {"revision": source.revision, "block": 0, "epoch": 0, "document": None, "token": 0}


def _blocks(
    source: StreamedSource, length: int, state: dict[str, Any], stop: threading.Event
) -> Generator[Block, None, None]:
    """The blocks from `state` on, without end (but ends once `stop` is set)."""
    step = source.block_rows * length  # the last token of a block is also the first of the next
    pending: list[Piece] = []
    available, index = 0, state["block"]
    for piece in _pieces(source, state, stop):
        pending.append(piece)
        available += len(piece.tokens)
        if available <= step:
            continue
        tokens = np.concatenate([one.tokens for one in pending])
        while available > step:
            yield _block(source, length, index, pending[0], tokens)
            tokens, available, index = tokens[step:], available - step, index + 1
            pending = _behind(pending, step)


def _block(source: StreamedSource, length: int, index: int, first: Piece, tokens: np.ndarray) -> Block:
    stride = tokens.strides[0]
    state = _start(source) | {
        "block": index, "epoch": first.epoch, "document": first.before, "token": first.skipped,
    }  # fmt: skip
    rows = as_strided(tokens, (source.block_rows, length + 1), (length * stride, stride), writeable=False)
    return Block(index, state, rows)


def _behind(pieces: list[Piece], taken: int) -> list[Piece]:
    """`pieces` without their first `taken` tokens; at least one token is left."""
    number = 0
    while len(pieces[number].tokens) <= taken:
        taken -= len(pieces[number].tokens)
        number += 1
    first = pieces[number]
    rest = Piece(first.tokens[taken:], first.epoch, first.before, first.skipped + taken)
    return [rest, *pieces[number + 1 :]]


def _pieces(source: StreamedSource, state: dict[str, Any], stop: threading.Event) -> Iterator[Piece]:
    """The training documents as tokens from `state` on, epoch after epoch."""
    epoch, position, skip = state["epoch"], state["document"], state["token"]
    while not stop.is_set():
        whole_epoch, found = position is None, False
        for before, tokens in _tokenised(source, position, stop):
            found = True
            if len(tokens) > skip:
                yield Piece(tokens[skip:], epoch, before, skip)
            skip = 0
        if whole_epoch and not found and not stop.is_set():
            raise DataError(
                f"{source.text.source.corpus} (split {source.text.source.split}) holds no training text: all of its "
                f"documents are empty or held out for validation (fraction {source.held_out})."
            )
        epoch, position, skip = epoch + 1, None, 0


def _tokenised(
    source: StreamedSource, position: Position, stop: threading.Event
) -> Iterator[tuple[Position, np.ndarray]]:
    """(position before, int32 tokens with the end-of-text token) of each training document behind `position`."""
    ending = np.array([] if source.tokenizer.eos_id is None else [source.tokenizer.eos_id], dtype=np.int32)
    documents = _training_documents(source, position, stop)
    while group := list(islice(documents, GROUP)):
        encoded = source.tokenizer.encode_batch([text for _, text in group])
        for (before, _), ids in zip(group, encoded, strict=True):
            yield before, np.concatenate([ids.astype(np.int32, copy=False), ending])


def _training_documents(
    source: StreamedSource, position: Position, stop: threading.Event
) -> Iterator[tuple[Position, str]]:
    for document in source.text.documents(position, stop):
        if not is_held_out(document.text, source.held_out):
            yield position, document.text
        position = document.after


def validation_documents(text: HubText, fraction: float, count: int, limit: int | None = None) -> list[str]:
    """The first `count` held-out documents of a stream: its fixed validation text.

    Args:
        limit: how many documents to look through; None: those that hold `count` of them twice over
    Raises:
        DataError: none was found.
    """
    limit = limit or int(2 * count / fraction) + 1
    looked_at = islice(text.documents(), limit)
    found = list(islice((one.text for one in looked_at if is_held_out(one.text, fraction)), count))
    if not found:
        raise DataError(
            f"none of the first {limit} documents of {text.source.corpus} falls into the hold-out of "
            f"data.validation.fraction={fraction}. Raise the fraction."
        )
    return found


def training_sample(text: HubText, fraction: float, sample_bytes: int) -> Iterator[str]:
    """The first training documents of a stream, up to `sample_bytes` of UTF-8: what a tokenizer is trained on."""
    left = sample_bytes
    for document in text.documents():
        if is_held_out(document.text, fraction):
            continue
        yield document.text
        left -= len(document.text.encode())
        if left <= 0:
            return
