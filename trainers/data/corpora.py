"""Corpora: where text comes from. Every one yields the same kind of pieces in bounded memory.

The text is what the source holds with three changes: a byte order mark is dropped, \\r\\n and \\r become \\n, empty
documents are passed over. One text file is one document; a JSONL line or a Parquet row is one document.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainers.config import SourceConfig
from trainers.data.content_hash import CORPUS_FORMAT, FileHashes, digest
from trainers.data.formats import COMPRESSIONS, KINDS, FileFormat, file_format, file_pieces, named_format
from trainers.data.hub_corpus import HubCorpus
from trainers.data.pieces import Piece, whole_documents
from trainers.data.reading import unreadable
from trainers.data.stdlib_corpus import VIEWS, StdlibCorpus
from trainers.errors import DataError


class Corpus(Protocol):
    """Documents in a fixed order. Reading raises DataError naming the file (and line or byte) that cannot be used."""

    @property
    def name(self) -> str: ...

    @property
    def size_bytes(self) -> int | None:
        """Bytes stored, compressed where it is; None where nobody knows before reading."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """The text in bounded memory: at most about 1 M characters, or one JSONL line, at a time."""
        ...

    def documents(self) -> Iterator[str]: ...

    def content_hash(self, hashes: FileHashes | None = None) -> str:
        """64 hex digits that change whenever the text could. `hashes` remembers files that have not changed."""
        ...

    def describe(self) -> dict[str, Any]:
        """What it is, for the terminal and MLflow; JSON."""
        ...


def open_corpus(source: SourceConfig) -> Corpus:
    """The corpus a source names: python-stdlib[/prose|/code], hf:OWNER/NAME, or a file or folder.

    Raises:
        DataError: nothing of that name, no permission, or a folder without a file that can be read.
    """
    if source.corpus in VIEWS:
        return StdlibCorpus(source.corpus)
    if source.corpus.startswith("hf:"):
        return HubCorpus(source)
    path = Path(source.corpus).expanduser()
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        return _open_folder(path, source.text_field)
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: not a regular file or folder. Save the text to a file first.")
    return FileCorpus(path, source.text_field)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise DataError(
            f"no corpus, file or folder {str(path)!r}.{_did_you_mean(path)} "
            f"A corpus is {', '.join(VIEWS)}, hf:OWNER/NAME, or the path of a file or folder."
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _did_you_mean(path: Path) -> str:
    near = difflib.get_close_matches(str(path), VIEWS, n=1)
    try:
        siblings = sorted(os.listdir(path.parent))
    except (OSError, ValueError):
        siblings = []
    near += [str(path.parent / name) for name in difflib.get_close_matches(path.name, siblings, n=2)]
    return f" Did you mean {' or '.join(near)}?" if near else ""


@dataclass(frozen=True)
class FileCorpus:
    """One text, JSONL or Parquet file; a suffix not known is read as text."""

    path: Path
    text_field: str = "text"

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def size_bytes(self) -> int:
        return _size(self.path)

    @property
    def _format(self) -> FileFormat:
        return named_format(self.path)

    def pieces(self) -> Iterator[Piece]:
        if self.size_bytes == 0:
            raise DataError(f"{self.path}: the file is empty.")
        return file_pieces(self.path, self._format, self.text_field)

    def documents(self) -> Iterator[str]:
        return whole_documents(self.pieces())

    def content_hash(self, hashes: FileHashes | None = None) -> str:
        bytes_hash = (hashes or FileHashes()).sha256(self.path)
        return digest(CORPUS_FORMAT, *_reading(self._format, self.text_field), bytes_hash)

    def describe(self) -> dict[str, Any]:
        return {"corpus": self.name, "kind": self._format.kind, "size_bytes": self.size_bytes}


@dataclass(frozen=True)
class FolderCorpus:
    """The files below a folder that can be read, in the order of their relative paths."""

    path: Path
    files: tuple[Path, ...]
    passed_over: tuple[Path, ...]
    """files of other kinds"""
    text_field: str = "text"

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def size_bytes(self) -> int:
        return sum(_size(file) for file in self.files)

    def pieces(self) -> Iterator[Piece]:
        for file in self.files:
            if _size(file):
                yield from file_pieces(file, _known_format(file), self.text_field)

    def documents(self) -> Iterator[str]:
        return whole_documents(self.pieces())

    def content_hash(self, hashes: FileHashes | None = None) -> str:
        hashes = hashes or FileHashes()
        files = [
            [
                file.relative_to(self.path).as_posix(),
                *_reading(_known_format(file), self.text_field),
                hashes.sha256(file),
            ]
            for file in self.files
        ]
        return digest(CORPUS_FORMAT, files)

    def describe(self) -> dict[str, Any]:
        return {
            "corpus": self.name,
            "kind": "folder",
            "size_bytes": self.size_bytes,
            "files": len(self.files),
            "passed_over": len(self.passed_over),
            "passed_over_examples": [file.relative_to(self.path).as_posix() for file in self.passed_over[:5]],
        }


def _open_folder(path: Path, text_field: str) -> FolderCorpus:
    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename), error) from None

    files: list[Path] = []
    others: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            (files if file_format(file) and file.is_file() else others).append(file)
    if not files:
        suffixes = " ".join(f".{suffix}" for suffix in KINDS)
        raise DataError(
            f"{path}: no file in this folder can be read ({len(others)} of other kinds). Read are {suffixes}, "
            f"each also with {' '.join('.' + suffix for suffix in COMPRESSIONS)}; name another file itself to read it "
            "as text."
        )
    return FolderCorpus(path, _in_order(path, files), _in_order(path, others), text_field)


def _in_order(folder: Path, files: list[Path]) -> tuple[Path, ...]:
    return tuple(sorted(files, key=lambda file: file.relative_to(folder).as_posix()))


def _known_format(file: Path) -> FileFormat:
    known = file_format(file)
    assert known is not None  # _open_folder kept only such files
    return known


def _reading(known: FileFormat, text_field: str) -> tuple[str, str, str]:
    """What beside the bytes decides the text: kind, compression and, where there are fields, which."""
    return known.kind, known.compression, "" if known.kind == "text" else text_field


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None
