"""Text in pieces, so that a document of any length passes through bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PIECE_CHARS = 1 << 20
CHUNK_CHARS = 1 << 14


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one document; pieces in order are the corpus."""

    text: str
    """never empty; newlines are \\n"""
    ends_document: bool
    stored: int = 0
    """bytes of storage read for it, for progress and for estimates (compressed files: compressed bytes)"""


def document_pieces(text: str, stored: int = 0) -> Iterator[Piece]:
    """The pieces of one whole document; nothing for an empty one."""
    for start in range(0, len(text), PIECE_CHARS):
        part = text[start : start + PIECE_CHARS]
        yield Piece(part, start + PIECE_CHARS >= len(text), stored if start == 0 else 0)


def whole_documents(pieces: Iterable[Piece]) -> Iterator[str]:
    """The documents that the pieces make up, each in memory whole."""
    parts: list[str] = []
    for piece in pieces:
        parts.append(piece.text)
        if piece.ends_document:
            yield "".join(parts)
            parts = []
    if parts:
        yield "".join(parts)


def normalise_newlines(text: str) -> str:
    """The text with \\r\\n and lone \\r as \\n: the one change every corpus makes."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def utf8_length(text: str) -> int:
    """Bytes of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def chunks(pieces: Iterable[Piece], limit: int = CHUNK_CHARS) -> Iterator[Piece]:
    """The same text recut into at most `limit` characters, inside a document only before a space or newline
    that follows a non-space.

    Byte-level BPE's pre-tokenizer and SentencePiece's whitespace rule always break there, so encoding the chunks one
    by one equals encoding the document whole. Where `limit` characters offer no such place (a run without spaces, or
    of spaces alone) the cut falls at the limit.
    """
    rest, stored = "", 0
    for piece in pieces:
        text = rest + piece.text if rest else piece.text
        stored += piece.stored
        start = 0
        while len(text) - start > limit:
            cut = _last_break(text, start, start + limit)
            yield Piece(text[start:cut], False, stored)
            start, stored = cut, 0
        rest = text[start:] if start else text
        if piece.ends_document:
            yield Piece(rest, True, stored)
            rest, stored = "", 0
    if rest:
        yield Piece(rest, False, stored)


def _last_break(text: str, start: int, end: int) -> int:
    """The last index in (start, end] of a space, tab or newline that follows a non-space; `end` where there is none."""
    at = end
    while True:
        at = max(text.rfind(" ", start + 1, at + 1), text.rfind("\n", start + 1, at + 1))
        if at < 0:
            return end
        if text[at - 1].isspace():  # inside a run of spaces: go to its start in one stride
            at = start + len(text[start:at].rstrip())
            if at == start:
                return end
        if text[at] in " \n\t":
            return at
        at -= 1


def batches(pieces: Iterable[Piece], n_chars: int) -> Iterator[list[Piece]]:
    """Lists of consecutive pieces, each list of about `n_chars` characters."""
    batch: list[Piece] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece.text)
        if held >= n_chars or len(batch) >= 16_384:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
