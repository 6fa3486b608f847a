"""RunConfig: one frozen value that describes a run completely.

Imports no torch, so that a configuration is valid or invalid alike on every machine, in milliseconds.
Field comments say what a value means; a default is what a newcomer should get.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Frozen(BaseModel):
    """Base of every part: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, (list, tuple)):
            refused = any(isinstance(item, bool) for item in value)
        else:
            refused = isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation)
        if refused:
            raise ValueError(f"true and false mean nothing here, got {value}.")
        return value


class ModelConfig(Frozen):
    """A decoder-only transformer; every dense architecture of the presets is a setting of these fields."""

    # The upper bounds lie far beyond any model; below them every count and byte fits into 64 bits.
    d_model: Annotated[int, Field(gt=0, le=10**6)] = 128
    n_layers: Annotated[int, Field(gt=0, le=1000)] = 2
    n_heads: PositiveInt = 4
    d_ff: Annotated[int, Field(gt=0, le=10**7)] | None = None  # feed-forward width; None means 4 x d_model
    context_length: Annotated[int, Field(gt=0, le=10**9)] = 64  # longest sequence the position scheme covers
    vocab_size: Annotated[int, Field(gt=0, le=10**8)] | None = None  # None: what the tokenizer has
    norm: Literal["layernorm", "rmsnorm", "deepnorm"] = "rmsnorm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: PositiveFloat | None = None  # None: 1e-6 for rmsnorm, 1e-5 for the others
    final_norm: Literal["same", "rmsnorm", "none"] = "same"  # the norm before the head
    positions: Literal["learned", "sinusoidal", "rope", "rope_interleaved"] = "learned"
    rope_base: PositiveFloat = 10_000.0
    activation: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True  # in attention and feed-forward projections; the output head never has one
    tie_embeddings: bool = True
    dropout: Fraction = 0.1
    dropout_positions: bool = False  # drop parts of the position vectors too, before they are added (fundamentallm)
    init_std: PositiveFloat = 0.02
    activation_checkpointing: bool = False

    @property
    def ffn_width(self) -> int:
        return self.d_ff or 4 * self.d_model

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        if self.d_model % self.n_heads:
            below = self.d_model // self.n_heads * self.n_heads
            way_out = f"d_model {below} or {below + self.n_heads}" if below else f"d_model {self.n_heads}"
            raise ValueError(
                f"model.d_model ({self.d_model}) must be a multiple of model.n_heads ({self.n_heads}). "
                f"Nearest: {way_out}."
            )
        if self.positions.startswith("rope") and (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"rotary positions need an even head width, but d_model / n_heads = {self.d_model // self.n_heads}."
            )
        if self.norm == "deepnorm" and self.norm_position != "post":
            raise ValueError("model.norm=deepnorm is a post-norm block: set model.norm_position=post.")
        return self


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


def _exactly_one(part: Frozen, path: str, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(part, name) is not None]
    if len(given) != 1:
        got = ", ".join(f"{name}={getattr(part, name)}" for name in given) or "none"
        raise ValueError(f"{path}: set exactly one of {', '.join(names)}; got {got}.")


class BatchConfig(Frozen):
    """What optimisation sees (sequences or tokens a step, over all workers) and what memory allows."""

    sequences: PositiveInt | None = 8
    tokens: PositiveInt | None = None  # instead of sequences
    micro_sequences: PositiveInt | None = None  # rows in one forward on one worker; None: all of its share

    @model_validator(mode="after")
    def _one_size(self) -> BatchConfig:
        _exactly_one(self, "batch", ("sequences", "tokens"))
        return self


class BudgetConfig(Frozen):
    """How long to train: steps, tokens or epochs; the other two are derived and shown."""

    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    epochs: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_clock(self) -> BudgetConfig:
        _exactly_one(self, "budget", ("steps", "tokens", "epochs"))
        return self


class OptimConfig(Frozen):
    name: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    lr: PositiveFloat = 3e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    momentum: Fraction = 0.9  # sgd and rmsprop
    alpha: Fraction = 0.9  # rmsprop's averaging
    weight_decay: NonNegativeFloat = 0.01
    decay: Literal["linear", "matrices", "all"] = "linear"  # weights of Linear layers, tensors of >= 2 dims, all
    clip_norm: PositiveFloat | None = 1.0
    label_smoothing: Fraction = 0.0
    on_nonfinite: Literal["skip", "raise", "stop"] = "skip"  # what a non-finite loss or gradient does
    nonfinite_limit: PositiveInt = 10  # this many in a row end the run under skip


class ScheduleConfig(Frozen):
    """Learning rate over the steps of a phase: linear warm-up, then the named shape."""

    kind: Literal["constant", "linear", "cosine", "step", "inverse_sqrt", "wsd"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1  # of linear, cosine, wsd and the floor of step
    step_size: PositiveFloat = 3.0  # step: the interval, in `step_unit`
    step_unit: Literal["steps", "epochs"] = "epochs"
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.5  # step: the factor at each interval
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2  # wsd: the last part, which decays linearly


class PrecisionConfig(Frozen):
    compute: Literal["fp32", "fp16", "bf16"] = "fp32"


class EvaluationConfig(Frozen):
    """Scores the fixed validation text; always at the end of a phase too."""

    every_steps: PositiveInt | None = None
    every_epochs: PositiveFloat | None = 1.0
    max_tokens: PositiveInt | None = None  # the first so many validation tokens; None: all of them

    @model_validator(mode="after")
    def _one_cadence(self) -> EvaluationConfig:
        if self.every_steps is not None and self.every_epochs is not None:
            raise ValueError("evaluation: set every_steps or every_epochs, not both.")
        return self


class EarlyStoppingConfig(Frozen):
    patience: Annotated[int, Field(ge=0)] = 0  # evaluations without improvement; 0 is off
    metric: Literal["val/loss", "val/perplexity", "val/bits_per_byte", "val/bits_per_character", "val/accuracy"] = (
        "val/loss"
    )
    mode: Literal["min", "max"] = "min"
    min_delta: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _mode_fits_the_metric(self) -> EarlyStoppingConfig:
        better, way = ("higher", "max") if self.metric == "val/accuracy" else ("lower", "min")
        if self.mode != way:
            raise ValueError(
                f"early_stopping.metric={self.metric} is better the {better} it is: set early_stopping.mode={way} "
                f"(mode={self.mode} would keep the worst checkpoint as the best)."
            )
        return self


class CheckpointConfig(Frozen):
    """When to save and what to keep. Does not change the result, so it is no part of the fingerprint."""

    every_steps: PositiveInt | None = None
    every_epochs: PositiveFloat | None = None
    every_minutes: PositiveFloat | None = 5.0
    keep_last_n: PositiveInt = 3
    save_best: bool = True  # keeps the checkpoint with the best evaluation besides
    on_disk_full: Literal["continue", "stop"] = "continue"


class LoggingConfig(Frozen):
    every_steps: PositiveInt = 10


class SampleConfig(Frozen):
    """Text written at evaluations, beside what really follows the prompt in the validation text."""

    count: Annotated[int, Field(ge=0)] = 2
    prompt_tokens: PositiveInt = 32
    new_tokens: PositiveInt = 128
    temperature: Annotated[float, Field(ge=1e-4, allow_inf_nan=False)] = 0.8
    top_k: PositiveInt | None = 40


class ModelSwitches(Frozen):
    """What a phase may change in the model without changing its parameters."""

    dropout: Fraction | None = None
    activation_checkpointing: bool | None = None


class PhaseConfig(Frozen):
    """One stage of a run. What is left out is the run's own."""

    name: str
    data: DataConfig | None = None
    budget: BudgetConfig | None = None
    schedule: ScheduleConfig | None = None
    optim: OptimConfig | None = None
    model: ModelSwitches = ModelSwitches()
    hand_over: Literal["weights", "optimizer"] = "weights"  # what it takes over from the phase before

    @model_validator(mode="after")
    def _name(self) -> PhaseConfig:
        if not NAME_PATTERN.fullmatch(self.name) or self.name.isdigit():
            raise ValueError(f"a phase name is letters, digits, '.', '_' and '-', not only digits; got {self.name!r}.")
        return self


class Phase(Frozen):
    """A phase with nothing left out, as the loop runs it."""

    index: int
    name: str
    model: ModelConfig
    data: DataConfig
    budget: BudgetConfig
    schedule: ScheduleConfig
    optim: OptimConfig
    hand_over: Literal["weights", "optimizer"]


class RunConfig(Frozen):
    """Everything about one training run."""

    preset: str = "custom"  # where it came from; a label
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    deterministic: bool = False  # bit-identical on one GPU too, at a cost; on the CPU runs always are
    workers: PositiveInt = 1
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: bool = False
    init_from: str | None = None  # a finished run whose weights this one starts from
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    budget: BudgetConfig | None = BudgetConfig(epochs=1)
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    samples: SampleConfig = SampleConfig()
    phases: tuple[PhaseConfig, ...] = ()  # empty: one phase made of the fields above

    # ---- what follows from the fields -------------------------------------------------------------

    @property
    def sequence_length(self) -> int:
        """Tokens in one row of a batch, over all phases alike."""
        return self.data.sequence_length or self.model.context_length

    @property
    def sequences_per_step(self) -> int:
        """Rows that one optimizer update sees, over all workers."""
        if self.batch.sequences is not None:
            return self.batch.sequences
        assert self.batch.tokens is not None
        return self.batch.tokens // self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.sequence_length

    @property
    def micro_sequences(self) -> int:
        """Rows in one forward pass of one worker."""
        return self.batch.micro_sequences or self.sequences_per_step // self.workers

    @property
    def accumulation(self) -> int:
        """Micro-batches a worker sums before an update."""
        return self.sequences_per_step // (self.micro_sequences * self.workers)

    def resolved_phases(self) -> tuple[Phase, ...]:
        """The run's phases with every inherited field filled in; at least one."""
        declared = self.phases or (PhaseConfig(name="main"),)
        phases = []
        for index, phase in enumerate(declared):
            budget = phase.budget or self.budget
            assert budget is not None  # _phase_budgets checked it
            switches = {key: value for key, value in phase.model.model_dump().items() if value is not None}
            phases.append(
                Phase(
                    index=index,
                    name=phase.name,
                    model=self.model.model_copy(update=switches),
                    data=phase.data or self.data,
                    budget=budget,
                    schedule=phase.schedule or self.schedule,
                    optim=phase.optim or self.optim,
                    hand_over=phase.hand_over,
                )
            )
        return tuple(phases)

    # ---- rules across parts -------------------------------------------------------------------------

    @model_validator(mode="after")
    def _sequence_fits(self) -> RunConfig:
        lengths = {phase.data.sequence_length for phase in self.phases if phase.data and phase.data.sequence_length}
        if lengths - {self.sequence_length}:
            raise ValueError(
                f"every phase trains on rows of data.sequence_length ({self.sequence_length}) tokens, "
                f"but a phase says {sorted(lengths)}."
            )
        if self.sequence_length > self.model.context_length:
            raise ValueError(
                f"data.sequence_length ({self.sequence_length}) must not exceed model.context_length "
                f"({self.model.context_length})."
            )
        return self

    @model_validator(mode="after")
    def _vocabulary_fits(self) -> RunConfig:
        table, trained = self.model.vocab_size, self.tokenizer.vocab_size
        if table is not None and trained is not None and trained > table:
            raise ValueError(
                f"tokenizer.vocab_size ({trained}) must not exceed model.vocab_size ({table}): "
                f"lower the first or set model.vocab_size={trained}."
            )
        return self

    @model_validator(mode="after")
    def _precision_fits_the_device(self) -> RunConfig:
        if self.device == "cpu" and self.precision.compute == "fp16":
            raise ValueError(
                "precision.compute=fp16 on device=cpu is about 30 times slower than fp32 (a CPU has no fp16 "
                "arithmetic): set precision.compute=fp32 or bf16, or device=cuda."
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> RunConfig:
        if self.batch.tokens is not None and self.batch.tokens % self.sequence_length:
            nearest = max(1, self.batch.tokens // self.sequence_length) * self.sequence_length
            raise ValueError(
                f"batch.tokens ({self.batch.tokens}) must be a multiple of the sequence length "
                f"({self.sequence_length}). Nearest: {nearest}."
            )
        total, unit = self.sequences_per_step, (self.batch.micro_sequences or 1) * self.workers
        if total % unit:
            below = total // unit * unit
            either = f"{below} or {below + unit}" if below else f"{unit}"
            raise ValueError(
                f"the batch of {total} sequences must be a multiple of micro_sequences x workers "
                f"({self.batch.micro_sequences or 1} x {self.workers} = {unit}). Nearest: {either}."
            )
        return self

    @model_validator(mode="after")
    def _phase_budgets(self) -> RunConfig:
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError(f"phase names must differ; got {', '.join(names)}.")
        missing = [phase.name for phase in self.phases if phase.budget is None]
        if self.budget is None and (missing or not self.phases):
            without = ", ".join(missing) or "the run"
            raise ValueError(f"budget: give the run a budget, or each phase its own (missing: {without}).")
        if self.budget is not None and self.phases and not missing:
            raise ValueError(
                "every phase has its own budget, so budget of the run would do nothing: set "
                + " or ".join(f"phases.{name}.budget.steps" for name in names)
                + " instead."
            )
        return self


# Setting one member of a group by a dotted override clears the others: `budget.steps=300` on a preset in epochs.
EXCLUSIVE: dict[type[Frozen], tuple[str, ...]] = {
    BudgetConfig: ("steps", "tokens", "epochs"),
    BatchConfig: ("sequences", "tokens"),
    EvaluationConfig: ("every_steps", "every_epochs"),
}


def epochs_to_steps(epochs: float, steps_per_epoch: int) -> int:
    """Optimizer updates in so many passes, at least one."""
    return max(1, math.floor(epochs * steps_per_epoch + 1e-9))
