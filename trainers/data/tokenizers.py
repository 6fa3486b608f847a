"""Tokenizers: characters and bytes here, byte-level BPE and SentencePiece in files of their own; made, saved, loaded.

All number their specials <PAD> 0, <UNK> 1, <BOS> 2, <EOS> 3, except bytes, whose ids 0 to 255 are the bytes themselves.
Training reads the training split only. Nothing is ever downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trainers.config import TokenizerConfig
from trainers.data.content_hash import digest
from trainers.data.pieces import utf8_length
from trainers.data.progress import Progress, Throttled, silent
from trainers.data.types import Tokenizer
from trainers.errors import DataError

SPECIALS = ("<PAD>", "<UNK>", "<BOS>", "<EOS>")
PAD, UNK, BOS, EOS = range(4)
MANIFEST = "tokenizer_kind.json"
UNICODE_END = 0x110000


class CharacterTokenizer:
    """One id a character: four specials, then the characters in code point order."""

    kind = "characters"
    pad_id: int | None = PAD
    eos_id: int | None = EOS

    def __init__(self, characters: str) -> None:
        """
        Args:
            characters: distinct, ascending
        """
        self.characters = characters
        self.vocab_size = len(SPECIALS) + len(characters)
        self._codes = _code_points(characters)
        highest = int(self._codes[-1]) if len(characters) else 0
        self._ids = np.full(highest + 2, UNK, dtype=np.int32)  # the last entry takes every higher code point
        self._ids[self._codes] = np.arange(len(SPECIALS), self.vocab_size, dtype=np.int32)
        self._texts = ["", SPECIALS[UNK], "", "", *characters]

    @property
    def fingerprint(self) -> str:
        return digest(self.kind, self.characters)

    def encode(self, text: str) -> np.ndarray:
        """int32 ids, one a character; 1 where the character is not in the vocabulary."""
        return np.take(self._ids, _code_points(text), mode="clip")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text without specials, but <UNK> as it is written; ids beyond the vocabulary are passed over."""
        texts = self._texts
        return "".join([texts[i] for i in np.asarray(ids).tolist() if i < len(texts)])

    def save(self, directory: Path) -> None:
        _write_json(directory / "characters.json", {
            "special_tokens": dict(zip(SPECIALS, range(4), strict=True)),
            "char_to_id": {char: i for i, char in enumerate(self.characters, len(SPECIALS))},
        })  # fmt: skip
        write_manifest(self, directory)

    @classmethod
    def load(cls, directory: Path) -> CharacterTokenizer:
        known = _read_json(directory / "characters.json").get("char_to_id")
        if not isinstance(known, dict) or list(known) != sorted(known) or any(len(char) != 1 for char in known):
            raise DataError(f"{directory / 'characters.json'}: not a tokenizer file.")
        return cls("".join(known))


class ByteTokenizer:
    """One id a byte of UTF-8: ids 0 to 255, padding 256, end of text 257."""

    kind = "bytes"
    vocab_size = 258
    pad_id: int | None = 256
    eos_id: int | None = 257

    @property
    def fingerprint(self) -> str:
        return digest(self.kind, self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(errors="surrogatepass"), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text without specials; bytes that are not UTF-8 (a model may write such) become U+FFFD."""
        array = np.asarray(ids, dtype=np.int64)
        return array[array < 256].astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, directory: Path) -> None:
        write_manifest(self, directory)


def train_tokenizer(
    config: TokenizerConfig, texts: Iterable[str], progress: Progress = silent, total_bytes: int = 0
) -> Tokenizer:
    """The tokenizer that `config` describes, from `texts`: the training text or the sample of it, in small stretches.

    Deterministic: the same texts give the same ids, on any number of cores.

    Raises:
        DataError: a vocabulary too small for the text, or `config.path` that cannot be loaded.
        UserError: the package it needs is not installed.
    """
    if config.kind == "characters":
        return CharacterTokenizer(_frequent_characters(_told(texts, progress, total_bytes), config.min_frequency))
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind == "bpe":
        from trainers.data import bpe

        return bpe.load(Path(config.path)) if config.path else bpe.train(config, texts, progress, total_bytes)
    from trainers.data import sentencepieces

    if config.path:
        return sentencepieces.load(Path(config.path), config.kind)
    return sentencepieces.train(config, texts, progress, total_bytes)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `save` wrote into `directory`.

    Raises:
        DataError: there is none, or it is not the one that was saved.
    """
    manifest = _read_json(directory / MANIFEST)
    tokenizer = _load_kind(manifest.get("kind"), directory)
    if tokenizer.fingerprint != manifest.get("fingerprint"):
        raise DataError(f"{directory}: the tokenizer was changed after it was saved. Restore the folder.")
    return tokenizer


def save_once(tokenizer: Tokenizer, directory: Path) -> None:
    """Save, unless the tokenizer stands there already: what is there is not torn by a kill."""
    with suppress(DataError):
        if load_tokenizer(directory).fingerprint == tokenizer.fingerprint:
            return
    tokenizer.save(directory)


def _load_kind(kind: Any, directory: Path) -> Tokenizer:
    if kind == "characters":
        return CharacterTokenizer.load(directory)
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        from trainers.data import bpe

        return bpe.load(directory / bpe.FILE)
    if kind in ("sentencepiece_bpe", "sentencepiece_unigram"):
        from trainers.data import sentencepieces

        return sentencepieces.load(directory / sentencepieces.FILE, kind)
    raise DataError(f"{directory / MANIFEST}: no tokenizer of kind {kind!r}.")


def write_manifest(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes what `load_tokenizer` goes by."""
    _write_json(directory / MANIFEST, {
        "format": 1, "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint,
    })  # fmt: skip


def _told(texts: Iterable[str], progress: Progress, total_bytes: int) -> Iterator[str]:
    reporter = Throttled(progress, total_bytes, "building the tokenizer")
    for text in texts:
        yield text
        reporter.add(utf8_length(text))
    reporter.finish()


def count_characters(texts: Iterable[str]) -> np.ndarray:
    """int64 (0x110000,): how often each code point occurs."""
    counts = np.zeros(UNICODE_END, dtype=np.int64)
    for text in texts:
        some = np.bincount(_code_points(text))
        counts[: len(some)] += some
    return counts


def _frequent_characters(texts: Iterable[str], min_frequency: int) -> str:
    return "".join(map(chr, np.flatnonzero(count_characters(texts) >= min_frequency).tolist()))


def _code_points(text: str) -> np.ndarray:
    """uint8 or uint32 (len(text),)."""
    if text.isascii():
        return np.frombuffer(text.encode(), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=True, indent=1) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path.parent}: no tokenizer here ({path.name} is missing).") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a tokenizer file.")
    return value
