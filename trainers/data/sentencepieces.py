"""SentencePiece BPE and unigram, set up so that nothing of a text is lost but the difference of U+2581 and a space."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainers.config import TokenizerConfig
from trainers.data.content_hash import digest
from trainers.data.pieces import Piece, chunks, utf8_length
from trainers.data.progress import Progress, Throttled, heartbeat, silent
from trainers.data.tokenizers import BOS, EOS, PAD, SPECIALS, UNK, write_manifest
from trainers.errors import DataError, UserError

FILE = "tokenizer.model"
THREADS = 2  # fixed: how the unigram counts are summed depends on it, so more cores must not mean more threads
SENTENCE_CHARS = 4096
SAMPLE_BYTES = {"sentencepiece_bpe": 100_000_000, "sentencepiece_unigram": 20_000_000}
"""what the trainer is given at most: it needs about 8 and 30 bytes of memory for each"""


class SentencePieceTokenizer:
    """A SentencePiece model, ours or one from a .model file."""

    def __init__(self, model: bytes, kind: str) -> None:
        self.kind = kind
        self._model = model
        self._processor = _library().SentencePieceProcessor(model_proto=model)
        self.vocab_size = int(self._processor.get_piece_size())
        self.pad_id: int | None = _id(self._processor.pad_id())
        self.eos_id: int | None = _id(self._processor.eos_id())
        self.fingerprint = digest(kind, model.hex())

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.int32) for ids in self._processor.encode(list(texts))]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text without specials; ids beyond the vocabulary are passed over."""
        return str(self._processor.decode([i for i in np.asarray(ids).tolist() if i < self.vocab_size]))

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE).write_bytes(self._model)
        write_manifest(self, directory)


def _id(number: int) -> int | None:
    return number if number >= 0 else None


def train(
    config: TokenizerConfig, texts: Iterable[str], progress: Progress = silent, total_bytes: int = 0
) -> SentencePieceTokenizer:
    """A model of at most `config.vocab_size` pieces: no normalisation, bytes for rare characters, newline a piece.

    Raises:
        DataError: the vocabulary is too small for the characters of the text.
    """
    library, model = _library(), io.BytesIO()
    try:
        with heartbeat(progress, total_bytes, total_bytes, "training the tokenizer"):
            library.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts, progress, total_bytes),
                model_writer=model,
                model_type=config.kind.removeprefix("sentencepiece_"),
                vocab_size=config.vocab_size,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                user_defined_symbols=["\n"],
                pad_id=PAD, unk_id=UNK, bos_id=BOS, eos_id=EOS,
                pad_piece=SPECIALS[PAD], unk_piece=SPECIALS[UNK], bos_piece=SPECIALS[BOS], eos_piece=SPECIALS[EOS],
                hard_vocab_limit=False,
                max_sentence_length=4 * SENTENCE_CHARS,
                input_sentence_size=0,
                shuffle_input_sentence=False,
                num_threads=THREADS,
                minloglevel=2,
            )  # fmt: skip
    except RuntimeError as error:
        raise _refusal(config, error) from None
    return SentencePieceTokenizer(model.getvalue(), config.kind)


def _refusal(config: TokenizerConfig, error: RuntimeError) -> DataError:
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
    if needed:
        return DataError(
            f"tokenizer.vocab_size ({config.vocab_size}) is too small for SentencePiece on this text: 4 specials, "
            f"256 bytes, the newline and its characters are {needed[1]} pieces. Set it to at least {needed[1]}."
        )
    if "insert_id" in str(error):  # not even the specials fit
        return DataError(
            f"tokenizer.vocab_size ({config.vocab_size}) is too small for SentencePiece: 4 specials, 256 bytes and the "
            "newline are 261 pieces, and each character of the text is one more. 8000 is common."
        )
    return DataError(f"SentencePiece cannot train {config.kind} with {config.vocab_size} pieces on this text: {error}")


def _sentences(texts: Iterable[str], progress: Progress, total_bytes: int) -> Iterator[str]:
    """The lines of the texts, long ones cut; nothing where there is no letter to learn from."""
    reporter = Throttled(progress, total_bytes, "reading for the tokenizer")
    for text in texts:
        for line in text.split("\n"):
            if line:
                yield from (part.text for part in chunks([Piece(line, True)], SENTENCE_CHARS))
        reporter.add(utf8_length(text))
    reporter.finish()


def load(path: Path, kind: str) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece .model file. Raises DataError where it cannot be loaded."""
    try:
        model = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise DataError(
            f"no tokenizer file {path} ({error.strerror}). tokenizer.path of kind {kind} is a SentencePiece .model."
        ) from None
    if model is None:
        raise DataError(f"no tokenizer file {path}. tokenizer.path of kind {kind} is a SentencePiece .model.")
    try:
        return SentencePieceTokenizer(model, kind)
    except RuntimeError:
        raise DataError(f"{path}: not a SentencePiece model.") from None


def _library() -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            "tokenizer.kind=sentencepiece_* needs the sentencepiece package: pip install sentencepiece"
        ) from None
    return sentencepiece
