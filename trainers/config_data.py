"""The data: which text, how it becomes token ids, what is held out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainers.config_fields import Frozen, PositiveFloat, PositiveInt


class TokenizerConfig(Frozen):
    """How text becomes token ids. Trained on the training split only, on at most `sample_bytes` of it."""

    kind: Literal["characters", "bytes", "bpe", "sentencepiece_bpe", "sentencepiece_unigram"] = "characters"
    # needed by bpe and sentencepiece, which set memory aside for it; derived for characters and bytes
    vocab_size: Annotated[int, Field(gt=0, le=2_000_000)] | None = None
    path: str | None = None  # a tokenizer to load instead: a SentencePiece .model or a tokenizers .json
    min_frequency: PositiveInt = 1
    sample_bytes: Annotated[int, Field(gt=0, le=200_000_000)] = 200_000_000

    @model_validator(mode="after")
    def _vocabulary(self) -> TokenizerConfig:
        trained = self.kind in ("bpe", "sentencepiece_bpe", "sentencepiece_unigram")
        if trained and self.path is None and self.vocab_size is None:
            raise ValueError(f"tokenizer.kind={self.kind} needs tokenizer.vocab_size (8000 is common) or a path.")
        if not trained and (self.vocab_size is not None or self.path is not None):
            raise ValueError(f"tokenizer.kind={self.kind} derives its vocabulary: leave vocab_size and path out.")
        if self.kind == "bpe" and self.vocab_size is not None and self.vocab_size < 260:
            raise ValueError(f"byte-level bpe needs at least 256 bytes + 4 specials = 260, not {self.vocab_size}.")
        return self


class SourceConfig(Frozen):
    """One corpus: an embedded name, a path, or `hf:OWNER/NAME`."""

    corpus: Annotated[str, Field(min_length=1)]  # python-stdlib[/prose|/code], a file or folder, or hf:OWNER/NAME
    text_field: str = "text"  # the field or column that holds the text in JSONL, Parquet and Hub datasets
    subset: str | None = None  # the Hub dataset's configuration name
    split: str = "train"  # the Hub dataset's split
    revision: str | None = None  # the Hub dataset's commit
    streaming: bool = False  # Hub: train while it downloads
    weight: PositiveFloat | None = None  # share in a mixture; give it for all sources or for none


class SplitConfig(Frozen):
    """What is held out for validation."""

    method: Literal["tail", "hash"] = "tail"  # the last part of the text, or whole documents by hash
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1


class DataConfig(Frozen):
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)] = (SourceConfig(corpus="python-stdlib"),)
    validation: SplitConfig = SplitConfig()
    sequence_length: PositiveInt | None = None  # tokens a row; None means model.context_length
    order: Literal["shuffled", "streams"] = "shuffled"  # streams: row r goes on where row r ended (stateful models)
    stream_block: PositiveInt = 1024  # rows that a streaming corpus shuffles among
    stream_validation_documents: PositiveInt = 200  # held-out documents a streaming corpus is scored on

    @model_validator(mode="after")
    def _weights(self) -> DataConfig:
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError(
                "data.sources: give every source a weight, or none (then they are joined in order). "
                f"Missing on: {', '.join(s.corpus for s in self.sources if s.weight is None)}."
            )
        streaming = [s.corpus for s in self.sources if s.streaming]
        if streaming and self.validation.method == "tail":
            raise ValueError(
                f"a streaming corpus ({', '.join(streaming)}) has no tail to hold out: set data.validation.method=hash."
            )
        return self
