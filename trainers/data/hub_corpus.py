"""A Hugging Face dataset as a corpus: downloaded whole and memory-mapped by `datasets`, or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from trainers.config import SourceConfig
from trainers.data.content_hash import CORPUS_FORMAT, FileHashes, digest
from trainers.data.hub import repository
from trainers.data.pieces import Piece, document_pieces, normalise_newlines, whole_documents
from trainers.errors import DataError, UserError

ROWS = 256  # fetched at a time


@dataclass
class HubCorpus:
    """One split of hf:OWNER/NAME; one row is one document. Downloads when it is first read or hashed."""

    source: SourceConfig
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.source.corpus

    @cached_property
    def _dataset(self) -> Any:
        dataset = load_dataset(self.source)
        if self.source.text_field not in dataset.column_names:
            raise DataError(
                f"{self.name} has no column {self.source.text_field!r}; it has {', '.join(dataset.column_names)}. "
                "Set text_field of this source."
            )
        return dataset.select_columns([self.source.text_field])

    @property
    def size_bytes(self) -> int | None:
        size = self._dataset.dataset_size
        return int(size) if size else None

    def pieces(self) -> Iterator[Piece]:
        dataset, row = self._dataset, 0
        stored = (self.size_bytes or 0) // max(1, len(dataset))
        for batch in dataset.iter(batch_size=ROWS):
            for text in batch[self.source.text_field]:
                row += 1
                if not isinstance(text, str) or "\0" in text:
                    what = "NUL in the text" if isinstance(text, str) else f"{text!r:.40} instead of text"
                    raise DataError(f"{self.name}, row {row}: {what} in the column {self.source.text_field!r}.")
                yield from document_pieces(normalise_newlines(text), stored)

    def documents(self) -> Iterator[str]:
        return whole_documents(self.pieces())

    def content_hash(self, hashes: FileHashes | None = None) -> str:
        """Name, subset, split, revision and the fingerprint that `datasets` gives what it downloaded."""
        del hashes
        source = self.source
        named = [source.corpus, source.subset, source.split, source.revision, source.text_field]
        return digest(CORPUS_FORMAT, named, self._dataset._fingerprint)

    def describe(self) -> dict[str, Any]:
        return {
            "corpus": self.name,
            "kind": "hub",
            "size_bytes": self.size_bytes,
            "rows": len(self._dataset),
            "subset": self.source.subset,
            "split": self.source.split,
            "revision": self.source.revision,
        }


def load_dataset(source: SourceConfig) -> Any:
    """The map-style datasets.Dataset of one split.

    Raises:
        DataError: it does not exist, its subset, split or revision does not, or the Hub cannot be reached.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source.corpus}: Hugging Face datasets need the datasets package: pip install datasets"
        ) from None
    name = repository(source)
    try:
        return datasets.load_dataset(name, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # the libraries below raise a dozen unrelated classes, all of them about this request
        first_line = (str(error).strip() or "no further message").splitlines()[0]
        raise DataError(
            f"cannot open {source.corpus} (subset {source.subset}, split {source.split}, revision {source.revision}): "
            f"{type(error).__name__}: {first_line}. Check name and network; gated datasets need `hf auth login`."
        ) from error
