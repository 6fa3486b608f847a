"""Everything between a configuration and the tokens of its phases: tokenizer, packed text, held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainers.config import Phase, RunConfig
from trainers.data import splits
from trainers.data.content_hash import FileHashes, digest
from trainers.data.packed import PACKED_FORMAT, PackedTokens, build_packed
from trainers.data.pieces import Piece, document_pieces
from trainers.data.progress import Progress, silent
from trainers.data.sources import Opened, PackedSource, Source, StreamSource, distinct_sources, open_phases
from trainers.data.splits import Extent
from trainers.data.stream import StreamedSource, open_stream, validation_documents
from trainers.data.survey import DataSurvey, survey
from trainers.data.tokenizer_cache import cached_tokenizer
from trainers.data.types import PhaseData, PreparedData, Tokenizer
from trainers.errors import DataError

__all__ = ["DataSurvey", "data_hashes", "prepare", "survey"]


def prepare(config: RunConfig, cache_dir: Path | str, *, progress: Progress = silent) -> PreparedData:
    """The tokenizer and the packed text of every phase, built where the cache does not hold them.

    One tokenizer serves all phases; it is trained on the union of their training text. Without weights the sources of
    a phase are joined in order into one packed text, with weights each has its own. Tail splits hold out the tail of
    each source. A second call finds everything by the hash of the text. Safe in several processes at once.

    Args:
        progress: called at least every 2 s with (done bytes, total bytes or 0, what)
    Raises:
        DataError: text that cannot be read, is too short or has no part to hold out; a full disk.
        ConfigError: phases that would train on each other's validation text.
    """
    preparation = _Preparation(config, Path(cache_dir), progress)
    phases = open_phases(config, preparation.opened)
    return preparation.run(phases)


def data_hashes(config: RunConfig, cache_dir: Path | str | None = None) -> tuple[str, ...]:
    """What the fingerprint covers: one content hash a source, phase by phase.

    Args:
        cache_dir: where hashes of unchanged files are remembered; None: every file is read
    Raises:
        DataError: a source cannot be opened or read.
    """
    opened = Opened(_file_hashes(cache_dir))
    return tuple(source.content_hash for phase in open_phases(config, opened) for source in phase)


def _file_hashes(cache_dir: Path | str | None) -> FileHashes:
    return FileHashes(None if cache_dir is None else Path(cache_dir) / "hashes")


class _Preparation:
    """One call of `prepare`."""

    def __init__(self, config: RunConfig, cache_dir: Path, progress: Progress) -> None:
        self.opened = Opened(_file_hashes(cache_dir), progress)
        self._config, self._cache_dir, self._progress = config, cache_dir, progress

    def run(self, phases: Sequence[Sequence[Source]]) -> PreparedData:
        sources = distinct_sources(phases)
        tokenizer, trained_on = cached_tokenizer(self._config.tokenizer, sources, self.opened, self._cache_dir)
        prepared, reports = [], []
        for phase, members in zip(self._config.resolved_phases(), phases, strict=True):
            data = self._phase(phase, members, tokenizer)
            prepared.append(data)
            reports.append({"name": phase.name, **_report(members, data)})
        wanted = self._config.tokenizer.vocab_size
        report = {
            "tokenizer": {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "vocab_size_wanted": wanted,
                "fingerprint": tokenizer.fingerprint,
                "trained_on_bytes": trained_on,
            },
            "phases": reports,
        }
        return PreparedData(tokenizer, tuple(prepared), report)

    def _phase(self, phase: Phase, sources: Sequence[Source], tokenizer: Tokenizer) -> PhaseData:
        weights = _shares(sources)
        validation = self._pack(sources, tokenizer, _held_out_pieces, sources, f"packing validation text of {phase.name}")
        groups = [[source] for source in sources] if weights or len(sources) == 1 else [list(sources)]
        trained = tuple(self._training(phase, group, sources, tokenizer) for group in groups)
        for data in trained:
            if isinstance(data, PackedTokens):
                _refuse_short(self._config, phase, sources, data, alone=len(trained) == 1)
        _refuse_unscored(phase, sources, validation)
        return PhaseData(trained, weights, validation)

    def _training(
        self, phase: Phase, group: Sequence[Source], sources: Sequence[Source], tokenizer: Tokenizer
    ) -> PackedTokens | StreamedSource:
        first = group[0]
        if isinstance(first, StreamSource):
            return open_stream(first.config, tokenizer, phase.data, first.text.revision)
        return self._pack(group, tokenizer, _training_pieces, sources, f"packing training text of {phase.name}")

    def _pack(
        self,
        group: Sequence[Source],
        tokenizer: Tokenizer,
        side: Callable[[Source, Opened], Iterator[Piece]],
        sources: Sequence[Source],
        what: str,
    ) -> PackedTokens:
        """One side of the sources of `group`, joined. `sources`: all of the phase, which decide on end-of-text tokens."""
        key = digest(
            PACKED_FORMAT, tokenizer.fingerprint, side.__name__, len(sources) > 1, [_identity(source) for source in group]
        )
        opened = self.opened
        end_documents = _LazyBool(lambda: len(sources) > 1 or _documents(sources[0], opened) > 1)
        total = sum(s.corpus.size_bytes or 0 for s in group if isinstance(s, PackedSource))
        target = self._cache_dir / "packed" / key[:32]
        parts = [_checked(side(source, opened), source, opened) for source in group]
        return build_packed(
            target, parts, tokenizer, end_documents=end_documents, progress=self._progress, total_bytes=total, what=what
        )
