"""The tokenizer of a run: trained once on the training text of all phases, then found in the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainers.config import TokenizerConfig
from trainers.data import splits
from trainers.data.build_once import build_once
from trainers.data.content_hash import FileHashes, digest
from trainers.data.pieces import chunks, document_pieces, utf8_length
from trainers.data.progress import Progress
from trainers.data.sentencepieces import SAMPLE_BYTES
from trainers.data.sources import Opened, PackedSource, Source, StreamSource
from trainers.data.stream import training_sample
from trainers.data.tokenizers import load_tokenizer, train_tokenizer
from trainers.data.types import Tokenizer
from trainers.errors import DataError

TOKENIZER_FORMAT = 1
STREAM_SAMPLE_BYTES = 20_000_000  # a stream should train soon, not download for hours first
SAMPLE = "sample.json"


def tokenizer_folder(config: TokenizerConfig, sources: Sequence[Source], opened: Opened, cache_dir: Path) -> Path:
    """Where the tokenizer of `config` for these sources stands, or will."""
    return cache_dir / "tokenizers" / _key(config, sources, opened.hashes)[:32]


def cached_tokenizer(
    config: TokenizerConfig, sources: Sequence[Source], opened: Opened, folder: Path
) -> tuple[Tokenizer, int]:
    """(the tokenizer in `folder`, made from these sources where there is none; bytes of text it was trained on).

    Raises:
        DataError: a source or `config.path` cannot be read, or the vocabulary does not fit the text.
    """

    def build(temporary: Path) -> None:
        sample = Sample(config, sources, opened)
        train_tokenizer(config, sample.texts(), opened.progress, sample.n_bytes).save(temporary)
        (temporary / SAMPLE).write_text(json.dumps({"trained_on_bytes": sample.taken_bytes}) + "\n")
        for source in sources:
            if isinstance(source, PackedSource):
                opened.unchanged(source)

    build_once(folder, build, opened.progress)
    try:
        return load_tokenizer(folder), int(json.loads((folder / SAMPLE).read_text())["trained_on_bytes"])
    except (DataError, OSError, ValueError, LookupError, TypeError) as error:
        reason = str(error).rstrip(".")
        raise DataError(f"{reason}. Delete {folder}, and the same command makes it again.") from None


def _key(config: TokenizerConfig, sources: Sequence[Source], hashes: FileHashes) -> str:
    if config.path is not None:
        path = Path(config.path)
        return digest(TOKENIZER_FORMAT, config.kind, hashes.sha256(path))
    texts = [[source.content_hash, source.split.model_dump()] for source in sources]
    return digest(TOKENIZER_FORMAT, config.model_dump(), [] if config.kind == "bytes" else texts)


class Sample:
    """The text a tokenizer is trained on: all training text up to `sample_bytes`, else stretches of 16 K characters
    spread evenly over it. A stream gives its first training documents."""

    def __init__(self, config: TokenizerConfig, sources: Sequence[Source], opened: Opened) -> None:
        self.taken_bytes = 0
        self._limit = min(config.sample_bytes, SAMPLE_BYTES.get(config.kind, config.sample_bytes))
        learns = config.kind != "bytes" and config.path is None
        self._packed = [source for source in sources if isinstance(source, PackedSource) and learns]
        self._streams = [source for source in sources if isinstance(source, StreamSource) and learns]
        self._opened = opened
        self._train_bytes = sum(opened.extent(source).train_bytes for source in self._packed)
        self._stream_bytes = min(STREAM_SAMPLE_BYTES, self._limit // max(1, len(sources)))
        self._packed_limit = self._limit - self._stream_bytes * len(self._streams)
        self.n_bytes = min(self._train_bytes, self._packed_limit) + self._stream_bytes * len(self._streams)

    def texts(self) -> Iterator[str]:
        for text in self._every():
            self.taken_bytes += utf8_length(text)
            yield text

    def _every(self) -> Iterator[str]:
        share = min(1.0, self._packed_limit / max(1, self._train_bytes))
        seen = taken = 0
        for source in self._packed:
            for chunk in chunks(splits.training(source.corpus, self._opened.extent(source))):
                size = utf8_length(chunk.text)
                seen += size
                if share == 1.0 or taken + size <= seen * share:
                    taken += size
                    yield chunk.text
        for stream in self._streams:
            yield from _stream_sample(stream, self._stream_bytes, self._opened.progress)


def _stream_sample(stream: StreamSource, limit: int, progress: Progress) -> Iterator[str]:
    taken = 0
    for document in training_sample(stream.text, stream.split.fraction, limit):
        for piece in chunks(document_pieces(document)):
            yield piece.text
        taken += utf8_length(document)
        progress(taken, limit, f"reading the first of {stream.config.corpus} for the tokenizer")
