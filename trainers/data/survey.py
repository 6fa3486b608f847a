"""What a run's data will be, from a bounded look at it: for plans, before anything is trained, packed or written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trainers.config import Phase, RunConfig, SourceConfig, SplitConfig
from trainers.data import splits
from trainers.data.content_hash import FileHashes, digest
from trainers.data.corpora import Corpus, open_corpus
from trainers.data.hub import resolve_revision
from trainers.data.length import refuse_short
from trainers.data.pieces import Piece, chunks, utf8_length, whole_documents
from trainers.data.sources import refuse_leaks
from trainers.data.splits import Extent
from trainers.data.tokenizers import SPECIALS, ByteTokenizer, count_characters, train_tokenizer
from trainers.data.types import Tokenizer
from trainers.initial import initial_tokenizer, unknown_note, unknown_share

WHOLE_BYTES = 110_000_000  # of text, over all sources: so much is read whole, in some seconds
MEASURED_CHUNKS = 128  # 2 MB, encoded where the tokenizer exists already


@dataclass(frozen=True)
class SourceSurvey:
    """One source. Counts are estimates unless `exact`."""

    corpus: str
    size_bytes: int | None
    """stored"""
    train_bytes: int | None
    """UTF-8; None for a Hub dataset, whose size is known once it is downloaded"""
    train_chars: int | None
    held_out_bytes: int | None
    held_out_chars: int | None
    n_documents: int | None
    exact: bool


@dataclass(frozen=True)
class PhaseSurvey:
    """One phase."""

    name: str
    sources: tuple[SourceSurvey, ...]
    train_tokens: tuple[int | None, ...]
    """of each text that rows are cut from, as in PhaseData.sources: one where the sources are joined"""
    held_out_tokens: int | None

    @property
    def total_train_tokens(self) -> int | None:
        known = [tokens for tokens in self.train_tokens if tokens is not None]
        return sum(known) if len(known) == len(self.train_tokens) else None


@dataclass(frozen=True)
class DataSurvey:
    """What a plan may say about the data of a run."""

    vocab_size: int
    exact: bool
    """whether all counts and the vocabulary are what training will find"""
    bytes_per_token: float
    phases: tuple[PhaseSurvey, ...]
    notes: tuple[str, ...]
    """what was assumed or sampled, one sentence each"""


def survey(config: RunConfig) -> DataSurvey:
    """Sizes, tokens and vocabulary of `config`'s data; trains no tokenizer, writes nothing, downloads no text.

    Up to 110 MB of text are read whole; of more, the beginning, and the rest is extrapolated from it.

    Raises:
        DataError: text that cannot be read, is too short or has no part to hold out.
        ConfigError: phases that would train on each other's validation text; a tokenizer of another kind than that
            of `init_from`.
    """
    return _Survey(config).run()


class _SizesOnly(FileHashes):
    """Names files instead of reading them: enough to see that two sources are one."""

    def sha256(self, path: Path) -> str:
        return digest(str(path.resolve()), path.stat().st_size)


class _Beginning:
    """The first `limit` bytes of text of a corpus, as a corpus."""

    def __init__(self, corpus: Corpus, limit: int) -> None:
        self.corpus, self.name, self.size_bytes = corpus, corpus.name, corpus.size_bytes
        self._limit = limit
        self.whole = True
        self.factor = 1.0
        """size of the corpus in units of what was read, once it was"""

    def pieces(self) -> Iterator[Piece]:
        n_bytes = stored = 0
        for piece in self.corpus.pieces():
            if n_bytes >= self._limit:
                self.whole, self.factor = False, max(1.0, (self.size_bytes or stored) / max(1, stored))
                return
            n_bytes += utf8_length(piece.text)
            stored += piece.stored
            yield piece

    def documents(self) -> Iterator[str]:
        return whole_documents(self.pieces())

    def content_hash(self, hashes: FileHashes | None = None) -> str:
        return self.corpus.content_hash(hashes or _SizesOnly())

    def describe(self) -> dict[str, Any]:
        return self.corpus.describe()


@dataclass(frozen=True)
class _Looked:
    """A source with what was read of it; corpus and extent are None for a Hub dataset."""

    config: SourceConfig
    split: SplitConfig
    content_hash: str
    corpus: _Beginning | None
    extent: Extent | None


class _Survey:
    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._notes: list[str] = []
        self._looked: dict[tuple[SourceConfig, SplitConfig], _Looked] = {}
        distinct = {source.corpus for phase in config.resolved_phases() for source in phase.data.sources}
        self._limit = WHOLE_BYTES // len(distinct)

    def run(self) -> DataSurvey:
        named = self._config.resolved_phases()
        phases = [[self._look(source, phase.data.validation) for source in phase.data.sources] for phase in named]
        refuse_leaks([looked for phase in phases for looked in phase])
        tokens = self._tokens(list(self._looked.values()))
        surveys = tuple(self._phase(phase, members, tokens) for phase, members in zip(named, phases, strict=True))
        exact = tokens.exact and all(looked.corpus and looked.corpus.whole for looked in self._looked.values())
        return DataSurvey(tokens.vocab_size, exact, tokens.bytes_per_token, surveys, tuple(self._notes))

    def _look(self, source: SourceConfig, split: SplitConfig) -> _Looked:
        key = source.model_copy(update={"weight": None}), split
        if key not in self._looked:
            self._looked[key] = self._open(*key)
        return self._looked[key]

    def _open(self, source: SourceConfig, split: SplitConfig) -> _Looked:
        if source.corpus.startswith("hf:"):
            revision = resolve_revision(source)
            self._notes.append(f"{source.corpus}: a Hub dataset; its length is known once it is downloaded.")
            return _Looked(source, split, digest(source.model_dump(), revision), None, None)
        corpus = _Beginning(open_corpus(source), self._limit)
        extent = splits.measure(corpus, split)
        if not corpus.whole:
            self._notes.append(f"{corpus.name}: extrapolated from its first {extent.n_bytes / 1e6:.0f} MB of text.")
        passed_over = corpus.describe().get("passed_over", 0)
        if passed_over:
            self._notes.append(f"{corpus.name}: {passed_over} files of other kinds are passed over.")
        return _Looked(source, split, corpus.content_hash(), corpus, extent)

    def _phase(self, phase: Phase, members: Sequence[_Looked], tokens: _Tokens) -> PhaseSurvey:
        several = len(members) > 1
        train = [tokens.count(looked, several, held_out=False) for looked in members]
        held_out = [tokens.count(looked, several, held_out=True) for looked in members]
        if phase.data.sources[0].weight is None:
            train = [_total(train)]
        if tokens.exact:
            refuse_short(
                self._config, phase.name, [looked.config.corpus for looked in members], train, _total(held_out)
            )
        return PhaseSurvey(phase.name, tuple(map(_source_survey, members)), tuple(train), _total(held_out))

    def _tokens(self, looked: Sequence[_Looked]) -> _Tokens:
        config = self._config.tokenizer
        given = initial_tokenizer(self._config)
        if given is not None:
            self._notes.append(f"the tokenizer ({given.vocab_size:,} tokens) is that of {self._config.init_from}.")
            self._say_unknown(given, looked)
            return self._given(given, looked)
        if config.kind == "characters":
            return self._characters(looked)
        if config.kind == "bytes":
            return _Tokens(ByteTokenizer.vocab_size, 1.0, exact=True, per="byte")
        if config.path is not None:
            return self._given(train_tokenizer(config, ()), looked)
        assert config.vocab_size is not None
        assumed = assumed_bytes_per_token(config.vocab_size)
        self._notes.append(
            f"no tokenizer is trained for a plan: {config.vocab_size:,} tokens of vocabulary as configured, and "
            f"{assumed:.1f} bytes a token assumed (English prose; code and other languages differ)."
        )
        return _Tokens(config.vocab_size, assumed, exact=False, per="byte")

    def _characters(self, looked: Sequence[_Looked]) -> _Tokens:
        read = [(one.corpus, one.extent) for one in looked if one.corpus and one.extent]
        counts = count_characters(_texts(read)) if read else np.zeros(0)
        vocab_size = len(SPECIALS) + int((counts >= self._config.tokenizer.min_frequency).sum())
        whole = len(read) == len(looked) and all(corpus.whole for corpus, _ in read)
        if not whole:
            self._notes.append(f"the vocabulary of {vocab_size} characters is counted in what was read, and may grow.")
        return _Tokens(vocab_size, _bytes_per_character(looked), exact=whole, per="character")

    def _given(self, tokenizer: Tokenizer, looked: Sequence[_Looked]) -> _Tokens:
        """What a tokenizer that exists already makes of the text; of characters and bytes each is a token."""
        if tokenizer.kind == "bytes":
            return _Tokens(tokenizer.vocab_size, 1.0, exact=True, per="byte")
        if tokenizer.kind == "characters":
            whole = all(one.corpus is not None and one.corpus.whole for one in looked)
            return _Tokens(tokenizer.vocab_size, _bytes_per_character(looked), exact=whole, per="character")
        return self._measured(tokenizer, looked)

    def _say_unknown(self, tokenizer: Tokenizer, looked: Sequence[_Looked]) -> None:
        """A note about text that the tokenizer of `init_from` does not know; ConfigError where it is too much."""
        share = unknown_share(tokenizer, tokenizer.encode_batch(_beginnings(looked)))
        if note := unknown_note(self._config, share):
            self._notes.append(note)

    def _measured(self, tokenizer: Tokenizer, looked: Sequence[_Looked]) -> _Tokens:
        texts = _beginnings(looked)
        n_tokens = sum(map(len, tokenizer.encode_batch(texts)))
        ratio = sum(map(utf8_length, texts)) / n_tokens if n_tokens else assumed_bytes_per_token(tokenizer.vocab_size)
        self._notes.append(
            f"{ratio:.2f} bytes a token, measured on the first {len(texts)} stretches of 16 K characters."
        )
        return _Tokens(tokenizer.vocab_size, ratio, exact=False, per="byte")


@dataclass(frozen=True)
class _Tokens:
    """How text turns into numbers of tokens."""

    vocab_size: int
    bytes_per_token: float
    exact: bool
    per: str
    """character or byte"""

    def count(self, looked: _Looked, several: bool, *, held_out: bool) -> int | None:
        """Tokens of one side of a source, end-of-text tokens included; None for a Hub dataset."""
        extent = looked.extent
        if extent is None or looked.corpus is None:
            return None
        chars, n_bytes, documents = extent.train_chars, extent.train_bytes, extent.train_documents
        if held_out:
            chars, n_bytes = extent.n_chars - chars, extent.n_bytes - n_bytes
            documents = extent.n_documents - documents
        text = chars if self.per == "character" else n_bytes / self.bytes_per_token
        endings = documents if several or extent.n_documents > 1 else 0
        return round((text + endings) * looked.corpus.factor)


def _beginnings(looked: Sequence[_Looked]) -> list[str]:
    """The first stretches of the sources, 16 K characters each."""
    return [text for one in looked if one.corpus for text in islice(_begin(one.corpus), MEASURED_CHUNKS)]


def assumed_bytes_per_token(vocab_size: int) -> float:
    """Bytes of English prose a token of a trained vocabulary covers: 1 at 256, half a byte more with each doubling.

    A rule of thumb (8,192: 3.5; 32,768: 4.5), good to some 15%.
    """
    return min(4.6, 1 + 0.5 * max(0.0, math.log2(vocab_size / 256)))


def _bytes_per_character(looked: Sequence[_Looked]) -> float:
    extents = [one.extent for one in looked if one.extent is not None]
    n_chars = sum(extent.n_chars for extent in extents)
    return sum(extent.n_bytes for extent in extents) / n_chars if n_chars else 1.0


def _texts(read: Sequence[tuple[_Beginning, Extent]]) -> Iterator[str]:
    """The training text of what was read."""
    for corpus, extent in read:
        yield from (piece.text for piece in splits.training(corpus, extent))


def _begin(corpus: Corpus) -> Iterator[str]:
    return (chunk.text for chunk in chunks(corpus.pieces()))


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _source_survey(looked: _Looked) -> SourceSurvey:
    corpus, extent = looked.corpus, looked.extent
    if corpus is None or extent is None:
        return SourceSurvey(looked.config.corpus, None, None, None, None, None, None, False)

    def whole(count: int) -> int:
        return round(count * corpus.factor)

    return SourceSurvey(
        corpus=looked.config.corpus,
        size_bytes=corpus.size_bytes,
        train_bytes=whole(extent.train_bytes),
        train_chars=whole(extent.train_chars),
        held_out_bytes=whole(extent.n_bytes - extent.train_bytes),
        held_out_chars=whole(extent.n_chars - extent.train_chars),
        n_documents=whole(extent.n_documents),
        exact=corpus.whole,
    )
