"""The sources of a run's phases, opened, with the rule that no phase trains on what another holds out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Protocol

from trainers.config import DataConfig, RunConfig, SourceConfig, SplitConfig
from trainers.data.content_hash import CORPUS_FORMAT, FileHashes, digest
from trainers.data.corpora import Corpus, open_corpus
from trainers.data.hub import HubText, resolve_revision
from trainers.data.progress import Progress, silent
from trainers.data.splits import Extent, measure
from trainers.data.stdlib_corpus import VIEWS
from trainers.errors import ConfigError, DataError


@dataclass(frozen=True)
class PackedSource:
    """A source whose text is read whole."""

    config: SourceConfig
    corpus: Corpus
    content_hash: str
    split: SplitConfig


@dataclass(frozen=True)
class StreamSource:
    """A source that is read while it downloads."""

    config: SourceConfig
    text: HubText
    content_hash: str
    data: DataConfig

    @property
    def split(self) -> SplitConfig:
        return self.data.validation


Source = PackedSource | StreamSource


@dataclass
class Opened:
    """Opens each source once and measures each split once."""

    hashes: FileHashes
    progress: Progress = silent
    _corpora: dict[SourceConfig, tuple[Corpus, str]] = field(default_factory=dict)
    _texts: dict[SourceConfig, HubText] = field(default_factory=dict)
    _extents: dict[tuple[str, SplitConfig], Extent] = field(default_factory=dict)

    def source(self, source: SourceConfig, data: DataConfig) -> Source:
        named = source.model_copy(update={"weight": None})
        if source.streaming:
            if not source.corpus.startswith("hf:"):
                raise ConfigError(f"only hf:OWNER/NAME streams: leave streaming out of the source {source.corpus}.")
            if named not in self._texts:
                self._texts[named] = HubText(named, resolve_revision(named))
            text = self._texts[named]
            fields = [source.corpus, source.subset, source.split, source.text_field, text.revision]
            return StreamSource(source, text, digest(CORPUS_FORMAT, "stream", fields), data)
        if named not in self._corpora:
            corpus = open_corpus(named)
            self._corpora[named] = corpus, corpus.content_hash(self.hashes)
        return PackedSource(source, *self._corpora[named], data.validation)

    def extent(self, source: PackedSource) -> Extent:
        """Where the split of the source falls. Raises DataError where a side would be empty."""
        key = source.content_hash, source.split
        if key not in self._extents:
            self._extents[key] = measure(source.corpus, source.split, self.progress)
        return self._extents[key]

    def unchanged(self, source: PackedSource) -> None:
        """Raises DataError where the corpus is no longer what its hash was taken of."""
        if source.corpus.content_hash(self.hashes) != source.content_hash:
            raise DataError(f"{source.corpus.name}: changed while it was being read. Run the same command again.")


def open_phases(config: RunConfig, opened: Opened) -> tuple[tuple[Source, ...], ...]:
    """The sources of each phase.

    Raises:
        DataError: one cannot be opened.
        ConfigError: text that one phase holds out would be trained on by another, or streams that cannot be joined.
    """
    phases = []
    for phase in config.resolved_phases():
        sources = phase.data.sources
        if len(sources) > 1 and any(s.streaming for s in sources) and sources[0].weight is None:
            raise ConfigError(
                f"phase {phase.name!r}: a streaming corpus has no end to join another to. Give every source a weight."
            )
        phases.append(tuple(opened.source(source, phase.data) for source in sources))
    refuse_leaks(distinct_sources(phases))
    return tuple(phases)


class SplitText(Protocol):
    """What the rule about held-out text needs to know of a source."""

    @property
    def config(self) -> SourceConfig: ...

    @property
    def content_hash(self) -> str: ...

    @property
    def split(self) -> SplitConfig: ...


def refuse_leaks(sources: Iterable[SplitText]) -> None:
    """Raises ConfigError where what one source holds out would be trained on through another."""
    distinct = {(source.content_hash, source.split): source for source in sources}
    for one, other in combinations(distinct.values(), 2):
        _refuse_leak(one, other)


def _refuse_leak(one: SplitText, other: SplitText) -> None:
    names = one.config.corpus, other.config.corpus
    if one.content_hash == other.content_hash:
        raise ConfigError(
            f"{names[0]} is used with two ways of holding out ({_words(one.split)}, and {_words(other.split)}), so "
            "that validation text of one would be trained on by the other. Give both the same data.validation."
        )
    if VIEWS[0] in names and all(name in VIEWS for name in names):
        raise ConfigError(
            f"{VIEWS[0]} contains the text of {' and '.join(n for n in names if n != VIEWS[0])}, so that validation "
            f"text of one would be trained on through the other. Use {VIEWS[1]} and {VIEWS[2]}, or {VIEWS[0]} alone."
        )
    if _nested(one, other) and not (one.split == other.split and one.split.method == "hash"):
        raise ConfigError(
            f"{names[0]} and {names[1]} overlap, so that validation text of one would be trained on through the other. "
            "Hold out the same data.validation.fraction of both with data.validation.method=hash, or leave one out."
        )


def _words(split: SplitConfig) -> str:
    return f"{split.method} {split.fraction:g}"


def _nested(one: SplitText, other: SplitText) -> bool:
    """Whether one is a file or folder inside the other."""
    paths = [_path(one), _path(other)]
    if None in paths:
        return False
    first, second = (path for path in paths if path)
    return first.is_relative_to(second) or second.is_relative_to(first)


def _path(source: SplitText) -> Path | None:
    name = source.config.corpus
    return None if name in VIEWS or name.startswith("hf:") else Path(name).expanduser().resolve()


def distinct_sources(phases: Sequence[Sequence[Source]]) -> tuple[Source, ...]:
    """The sources of all phases, each text once, in order of first appearance."""
    return tuple({(source.content_hash, source.split): source for phase in phases for source in phase}.values())
