"""Packed token files: a corpus as one memory-mapped array of token ids, with the starts of its documents.

A folder holds tokens.bin (uint16, or uint32 for more than 65,535 ids), documents.bin (int64, the index of each
document's first token) and meta.json (counts, sizes, checksums).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from trainers.data.build_once import build_once
from trainers.data.content_hash import digest
from trainers.data.pieces import Piece, batches, chunks, utf8_length
from trainers.data.progress import Progress, Throttled, silent
from trainers.data.types import Tokenizer
from trainers.errors import DataError

PACKED_FORMAT = 1
TOKENS, DOCUMENTS, META = "tokens.bin", "documents.bin", "meta.json"
BATCH_CHARS = 1 << 19  # in flight at a time: the encodings of so much BPE text are some 30 MB, and take about 0.1 s
UINT16_VOCABULARY = 65_535


@dataclass(frozen=True)
class Counts:
    """How much one source gave."""

    n_chars: int
    n_bytes: int
    """UTF-8"""
    n_documents: int
    n_tokens: int
    """with the end-of-text tokens"""


class PackedTokens:
    """A packed text, opened in microseconds whatever its length."""

    def __init__(self, path: Path | str) -> None:
        """
        Args:
            path: the folder that `build_packed` made
        Raises:
            DataError: a file is missing, or was cut off or changed after packing.
        """
        self.path = Path(path)
        self.meta = _read_meta(self.path)
        self.n_tokens: int = self.meta["n_tokens"]
        self.n_documents: int = self.meta["n_documents"]
        self.n_bytes: int = self.meta["n_bytes"]
        self.n_chars: int = self.meta["n_chars"]
        self.sha256: str = self.meta["files"][TOKENS]["sha256"]
        self.parts = tuple(Counts(**part) for part in self.meta["parts"])
        for name, facts in self.meta["files"].items():
            _check(self.path / name, facts)
        self.tokens = _map(self.path / TOKENS, np.dtype(self.meta["dtype"]), self.n_tokens)
        """uint16 or uint32 (n_tokens,), memory-mapped"""
        self.document_starts = _map(self.path / DOCUMENTS, np.dtype("<i8"), self.n_documents)
        """int64 (n_documents,), ascending, memory-mapped"""

    def __len__(self) -> int:
        return self.n_tokens

    def __reduce__(self) -> tuple[type[PackedTokens], tuple[Path]]:
        return PackedTokens, (self.path,)  # sent to another process as a path, not as gigabytes

    def verify(self) -> None:
        """Reads everything and compares the checksums. Raises DataError naming the file that differs."""
        for name, facts in self.meta["files"].items():
            _compare(self.path / name, facts)


def build_packed(
    directory: Path,
    parts: Sequence[Iterable[Piece]],
    tokenizer: Tokenizer,
    *,
    end_documents: bool,
    progress: Progress = silent,
    total_bytes: int = 0,
    what: str = "packing",
) -> PackedTokens:
    """The packed text in `directory`, built from `parts`, the sources joined in order, unless it is there.

    Args:
        end_documents: put the tokenizer's end-of-text token, where it has one, behind every document
    Raises:
        DataError: a source cannot be read, there is no room, or what is there is damaged.
    """

    def build(folder: Path) -> None:
        _pack(folder, parts, tokenizer, end_documents, Throttled(progress, total_bytes, what))

    build_once(directory, build, progress)
    return PackedTokens(directory)


# ---- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class _HashedFile:
    """A file that knows the checksum of what went into it."""

    file: IO[bytes]
    sha256: Any = field(default_factory=hashlib.sha256)

    def write(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).tobytes()
        self.file.write(data)
        self.sha256.update(data)


def _pack(
    folder: Path, parts: Sequence[Iterable[Piece]], tokenizer: Tokenizer, end_documents: bool, reporter: Throttled
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= UINT16_VOCABULARY else "<u4")
    ending = np.array([tokenizer.eos_id] if end_documents and tokenizer.eos_id is not None else [], dtype=np.int32)
    counts: list[Counts] = []
    with open(folder / TOKENS, "wb") as tokens, open(folder / DOCUMENTS, "wb") as documents:
        files = {TOKENS: _HashedFile(tokens), DOCUMENTS: _HashedFile(documents)}
        begin = 0
        for part in parts:
            counts.append(_pack_part(part, tokenizer, dtype, ending, begin, files, reporter))
            begin += counts[-1].n_tokens
        for file in (tokens, documents):
            file.flush()
            os.fsync(file.fileno())
    reporter.finish()
    totals = {name: sum(getattr(part, name) for part in counts) for name in Counts.__annotations__}
    meta = {
        "format": PACKED_FORMAT,
        "dtype": dtype.str,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        **totals,
        "parts": [asdict(part) for part in counts],
        "files": {name: _facts(folder / name, file.sha256.hexdigest()) for name, file in files.items()},
    }
    (folder / META).write_text(json.dumps({**meta, "checksum": digest(meta)}, indent=1) + "\n")


def _pack_part(
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    ending: np.ndarray,
    begin: int,
    files: dict[str, _HashedFile],
    reporter: Throttled,
) -> Counts:
    """Writes one source behind the `begin` tokens that are there."""
    n_chars = n_bytes = n_documents = 0
    position, inside = begin, False
    for batch in batches(chunks(pieces), BATCH_CHARS):
        arrays, starts = [], []
        for chunk, ids in zip(batch, tokenizer.encode_batch([chunk.text for chunk in batch]), strict=True):
            if not inside:
                starts.append(position)
            arrays.append(ids)
            position += len(ids)
            inside = not chunk.ends_document
            if chunk.ends_document and len(ending):
                arrays.append(ending)
                position += 1
            n_chars += len(chunk.text)
            n_bytes += utf8_length(chunk.text)
        files[TOKENS].write(np.concatenate(arrays).astype(dtype))
        files[DOCUMENTS].write(np.array(starts, dtype="<i8"))
        n_documents += len(starts)
        reporter.add(sum(chunk.stored for chunk in batch))
    return Counts(n_chars, n_bytes, n_documents, position - begin)


def _facts(path: Path, sha256: str) -> dict[str, Any]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read_meta(directory: Path) -> dict[str, Any]:
    path = directory / META
    try:
        meta = json.loads(path.read_text())
        checksum = meta.pop("checksum")
    except FileNotFoundError:
        raise DataError(f"{directory}: no packed text here ({META} is missing).{_again(directory)}") from None
    except (OSError, ValueError, KeyError, AttributeError):
        raise DataError(f"{path}: damaged.{_again(directory)}") from None
    if checksum != digest(meta):
        raise DataError(f"{path}: changed after it was written.{_again(directory)}")
    if meta["format"] != PACKED_FORMAT:
        raise DataError(f"{path}: format {meta['format']}, this version reads {PACKED_FORMAT}.{_again(directory)}")
    return dict(meta)


def _check(path: Path, facts: dict[str, Any]) -> None:
    """Cheap where nothing was touched; a file with another time is read whole, because a copy may be intact."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}).{_again(path.parent)}") from None
    if stat.st_size != facts["size"]:
        raise DataError(
            f"{path}: {stat.st_size:,} bytes, but {facts['size']:,} were packed: cut off or changed."
            + _again(path.parent)
        )
    if stat.st_mtime_ns != facts["mtime_ns"]:
        _compare(path, facts)


def _compare(path: Path, facts: dict[str, Any]) -> None:
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
            raise DataError(f"{path}: changed after packing (its checksum differs).{_again(path.parent)}")


def _again(directory: Path) -> str:
    return f" Delete {directory} to have it packed again."


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    if not length:
        return np.zeros(0, dtype=dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,))
