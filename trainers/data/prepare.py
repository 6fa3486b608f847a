"""Everything between a configuration and the tokens of its phases: tokenizer, packed text, held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainers.config import Phase, RunConfig
from trainers.data import splits
from trainers.data.content_hash import FileHashes, digest
from trainers.data.length import refuse_short
from trainers.data.packed import PACKED_FORMAT, PackedTokens, build_packed
from trainers.data.pieces import Piece, document_pieces
from trainers.data.progress import Progress, silent
from trainers.data.sources import Opened, PackedSource, Source, StreamSource, distinct_sources, open_phases
from trainers.data.stream import StreamedSource, open_stream, validation_documents
from trainers.data.survey import DataSurvey, survey
from trainers.data.tokenizer_cache import cached_tokenizer, tokenizer_folder
from trainers.data.types import PhaseData, PreparedData, Tokenizer
from trainers.initial import initial_tokenizer, unknown_note, unknown_share

__all__ = ["DataSurvey", "data_hashes", "prepare", "survey"]


def prepare(
    config: RunConfig, cache_dir: Path | str, *, run_dir: Path | None = None, progress: Progress = silent
) -> PreparedData:
    """The tokenizer and the packed text of every phase, built where the cache does not hold them.

    One tokenizer serves all phases; it is trained on the union of their training text. Without weights the sources of
    a phase are joined in order into one packed text, with weights each has its own. Tail splits hold out the tail of
    each source. A second call finds everything by the hash of the text. Safe in several processes at once.

    Args:
        run_dir: the run's own folder, whose tokenizer counts where it has begun from `init_from`
        progress: called at least every 2 s with (done bytes, total bytes or 0, what)
    Raises:
        DataError: text that cannot be read, is too short or has no part to hold out; a full disk.
        ConfigError: phases that would train on each other's validation text; text that the tokenizer of `init_from`
            does not know.
    """
    preparation = _Preparation(config, Path(cache_dir), run_dir, progress)
    return preparation.run(open_phases(config, preparation.opened))


def data_hashes(config: RunConfig, cache_dir: Path | str | None = None) -> tuple[str, ...]:
    """What the fingerprint covers: one content hash a source, phase by phase, and that of `tokenizer.path`.

    Args:
        cache_dir: where hashes of unchanged files are remembered; None: every file is read
    Raises:
        DataError: a source cannot be opened or read.
    """
    opened = Opened(_file_hashes(cache_dir))
    hashes = [source.content_hash for phase in open_phases(config, opened) for source in phase]
    if config.tokenizer.path is not None:
        hashes.append(opened.hashes.sha256(Path(config.tokenizer.path)))
    return tuple(hashes)


def _file_hashes(cache_dir: Path | str | None) -> FileHashes:
    return FileHashes(None if cache_dir is None else Path(cache_dir) / "hashes")


class _Preparation:
    """One call of `prepare`."""

    def __init__(self, config: RunConfig, cache_dir: Path, run_dir: Path | None, progress: Progress) -> None:
        self.opened = Opened(_file_hashes(cache_dir), progress)
        self._config, self._cache_dir, self._run_dir, self._progress = config, cache_dir, run_dir, progress

    def run(self, phases: Sequence[Sequence[Source]]) -> PreparedData:
        tokenizer, trained_on = self._tokenizer(phases)
        named = self._config.resolved_phases()
        data = tuple(self._phase(phase, sources, tokenizer) for phase, sources in zip(named, phases, strict=True))
        unknown = self._unknown(tokenizer, data)
        report = {
            "tokenizer": {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "vocab_size_wanted": self._config.tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
                "trained_on_bytes": trained_on,
                **({"unknown": unknown} if unknown else {}),
            },
            "phases": [
                {"name": phase.name, **_phase_report(sources, one)}
                for phase, sources, one in zip(named, phases, data, strict=True)
            ],
        }
        return PreparedData(tokenizer, data, report)

    def _tokenizer(self, phases: Sequence[Sequence[Source]]) -> tuple[Tokenizer, int]:
        given = initial_tokenizer(self._config, self._run_dir)
        if given is not None:
            return given, 0
        sources = distinct_sources(phases)
        folder = tokenizer_folder(self._config.tokenizer, sources, self.opened, self._cache_dir)
        if not folder.is_dir():
            for phase, members in zip(self._config.resolved_phases(), phases, strict=True):
                self._refuse_hopeless(phase, members)
        return cached_tokenizer(self._config.tokenizer, sources, self.opened, folder)

    def _unknown(self, tokenizer: Tokenizer, phases: Sequence[PhaseData]) -> str | None:
        """A sentence about text that the tokenizer of `init_from` does not know; ConfigError where it is too much."""
        if self._config.init_from is None:
            return None
        packed = (one for phase in phases for one in (*phase.sources, phase.validation))
        texts = (one.tokens for one in packed if isinstance(one, PackedTokens))
        return unknown_note(self._config, unknown_share(tokenizer, texts))

    def _refuse_hopeless(self, phase: Phase, sources: Sequence[Source]) -> None:
        """Before any work: no tokenizer makes more tokens than there are bytes and documents."""
        joined = [source for source in sources if isinstance(source, PackedSource)]
        extents = [self.opened.extent(source) for source in joined]
        limits = [extent.train_bytes + extent.train_documents for extent in extents]
        if joined and joined[0].config.weight is None:
            limits = [sum(limits)]
        unknown = [None] * (len(sources) - len(joined))
        refuse_short(self._config, phase.name, _names(sources), [*limits, *unknown], None)

    def _phase(self, phase: Phase, sources: Sequence[Source], tokenizer: Tokenizer) -> PhaseData:
        weights = _shares(sources)
        groups = [list(sources)] if weights is None else [[source] for source in sources]
        trained = tuple(self._training(phase, group, sources, tokenizer) for group in groups)
        what = f"packing held-out text of {phase.name}"
        validation = self._pack(sources, sources, tokenizer, _held_out_pieces, what)
        lengths = [len(data) if isinstance(data, PackedTokens) else None for data in trained]
        refuse_short(self._config, phase.name, _names(sources), lengths, len(validation))
        return PhaseData(trained, weights, validation)

    def _training(
        self, phase: Phase, group: Sequence[Source], sources: Sequence[Source], tokenizer: Tokenizer
    ) -> PackedTokens | StreamedSource:
        first = group[0]
        if isinstance(first, StreamSource):
            return open_stream(first.config, tokenizer, phase.data, first.text.revision)
        return self._pack(group, sources, tokenizer, _training_pieces, f"packing training text of {phase.name}")

    def _pack(
        self,
        group: Sequence[Source],
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        side: Callable[[Source, Opened], Iterator[Piece]],
        what: str,
    ) -> PackedTokens:
        """One side of the sources of `group`, joined; all `sources` of the phase decide on end-of-text tokens."""
        several = len(sources) > 1
        members = [_identity(source) for source in group]
        target = (
            self._cache_dir
            / "packed"
            / digest(PACKED_FORMAT, tokenizer.fingerprint, side.__name__, several, members)[:32]
        )
        if target.is_dir():
            return PackedTokens(target)
        return build_packed(
            target,
            [_unchanged(side(source, self.opened), source, self.opened) for source in group],
            tokenizer,
            end_documents=several or _has_several_documents(sources[0], self.opened),
            progress=self._progress,
            total_bytes=sum(source.corpus.size_bytes or 0 for source in group if isinstance(source, PackedSource)),
            what=what,
        )


def _names(sources: Sequence[Source]) -> list[str]:
    return [source.config.corpus for source in sources]


def _shares(sources: Sequence[Source]) -> tuple[float, ...] | None:
    """The weights of a mixture, summing to 1; None where the sources have none."""
    weights = [source.config.weight for source in sources if source.config.weight is not None]
    return tuple(weight / sum(weights) for weight in weights) or None


def _identity(source: Source) -> list[Any]:
    """What decides the packed text of a source, beside the tokenizer."""
    documents = source.data.stream_validation_documents if isinstance(source, StreamSource) else None
    return [source.content_hash, source.split.model_dump(), documents]


def _has_several_documents(source: Source, opened: Opened) -> bool:
    return isinstance(source, StreamSource) or opened.extent(source).n_documents > 1


def _training_pieces(source: Source, opened: Opened) -> Iterator[Piece]:
    assert isinstance(source, PackedSource)  # a stream is never packed
    return splits.training(source.corpus, opened.extent(source))


def _held_out_pieces(source: Source, opened: Opened) -> Iterator[Piece]:
    if isinstance(source, PackedSource):
        yield from splits.validation(source.corpus, opened.extent(source))
        return
    for document in validation_documents(source.text, source.split.fraction, source.data.stream_validation_documents):
        yield from document_pieces(document)


def _unchanged(pieces: Iterable[Piece], source: Source, opened: Opened) -> Iterator[Piece]:
    """The pieces, and an error at their end where the corpus is no longer what it was."""
    yield from pieces
    if isinstance(source, PackedSource):
        opened.unchanged(source)


def _phase_report(sources: Sequence[Source], data: PhaseData) -> dict[str, Any]:
    """What was read, trained on and held out, a source; JSON."""
    packed = [part for one in data.sources for part in (one.parts if isinstance(one, PackedTokens) else (None,))]
    return {
        "weights": data.weights,
        "train_tokens": [len(one) if isinstance(one, PackedTokens) else None for one in data.sources],
        "held_out_tokens": len(data.validation),
        "sources": [
            {**_describe(source), "train": part and asdict(part), "held_out": asdict(held_out)}
            for source, part, held_out in zip(sources, packed, data.validation.parts, strict=True)
        ],
    }


def _describe(source: Source) -> dict[str, Any]:
    how = {"content_hash": source.content_hash, "split": source.split.model_dump()}
    if isinstance(source, StreamSource):
        return {"corpus": source.config.corpus, "kind": "stream", "revision": source.text.revision, **how}
    return {**source.corpus.describe(), **how}
