"""Byte-level BPE by the `tokenizers` package: every text is encoded without loss, spaces and newlines included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainers.config import TokenizerConfig
from trainers.data.content_hash import digest
from trainers.data.pieces import utf8_length
from trainers.data.progress import Progress, heartbeat, silent
from trainers.data.tokenizers import SPECIALS, write_manifest
from trainers.errors import DataError, UserError

FILE = "tokenizer.json"
PAD_NAMES = ("<PAD>", "<pad>", "[PAD]", "<|padding|>")
EOS_NAMES = ("<EOS>", "</s>", "<|endoftext|>", "<eos>", "[EOS]", "<|end_of_text|>")


class BpeTokenizer:
    """A tokenizer of the `tokenizers` package, ours or one from a .json file."""

    kind = "bpe"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # "<EOS>" written in a text is text, not the end of it
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.pad_id: int | None = next((ids[name] for name in PAD_NAMES if name in ids), None)
        self.eos_id: int | None = next((ids[name] for name in EOS_NAMES if name in ids), None)
        self.fingerprint = digest(self.kind, tokenizer.to_str())

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text without specials; ids beyond the vocabulary are passed over."""
        known = [i for i in np.asarray(ids).tolist() if i < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(directory / FILE))
        write_manifest(self, directory)


def train(
    config: TokenizerConfig, texts: Iterable[str], progress: Progress = silent, total_bytes: int = 0
) -> BpeTokenizer:
    """A byte-level BPE of at most `config.vocab_size` tokens; fewer where the text has no more pairs to merge."""
    library = _library()
    pre_tokenizers, decoders = library.pre_tokenizers, library.decoders
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    read = _Reading(texts)
    with heartbeat(
        lambda _, total, what: progress(read.n_bytes, total, what), 0, total_bytes, "training the tokenizer"
    ):
        tokenizer.train_from_iterator(iter(read), trainer=trainer)
    return BpeTokenizer(tokenizer)


class _Reading:
    """Counts the bytes that the trainer has taken, for the heartbeat."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self.n_bytes = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.n_bytes += utf8_length(text)
            yield text


def load(path: Path) -> BpeTokenizer:
    """The tokenizer of a tokenizers .json file. Raises DataError where it cannot be loaded."""
    library = _library()
    if not path.is_file():
        raise DataError(f"no tokenizer file {path}. tokenizer.path of kind bpe is a .json of the tokenizers package.")
    try:
        return BpeTokenizer(library.Tokenizer.from_file(str(path)))
    except Exception as error:  # the package raises bare Exception
        raise DataError(f"{path}: the tokenizers package cannot load it ({error}).") from None


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise UserError("tokenizer.kind=bpe needs the tokenizers package: pip install tokenizers") from None
    return tokenizers
