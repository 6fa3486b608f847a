"""Training: the batch, the budget, the optimizer with its schedule, and what happens beside the steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainers.config_fields import Fraction, Frozen, NonNegativeFloat, PositiveFloat, PositiveInt, exactly_one


class BatchConfig(Frozen):
    """What optimisation sees (sequences or tokens a step, over all workers) and what memory allows."""

    sequences: PositiveInt | None = 8
    tokens: PositiveInt | None = None  # instead of sequences
    micro_sequences: PositiveInt | None = None  # rows in one forward on one worker; None: all of its share

    @model_validator(mode="after")
    def _one_size(self) -> BatchConfig:
        exactly_one(self, "batch", ("sequences", "tokens"))
        return self


class BudgetConfig(Frozen):
    """How long to train: steps, tokens or epochs; the other two are derived and shown."""

    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    epochs: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_clock(self) -> BudgetConfig:
        exactly_one(self, "budget", ("steps", "tokens", "epochs"))
        return self


class OptimConfig(Frozen):
    name: Literal["adamw", "adam", "sgd", "rmsprop", "lion", "ademamix"] = "adamw"  # the last two by bitsandbytes
    lr: PositiveFloat = 3e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    beta3: Fraction = 0.9999  # ademamix: of its slow average
    slow_weight: NonNegativeFloat = 5.0  # ademamix: the slow average's weight beside the fast one's (its alpha)
    momentum: Fraction = 0.9  # sgd and rmsprop
    alpha: Fraction = 0.9  # rmsprop's averaging
    weight_decay: NonNegativeFloat = 0.01
    decay: Literal["linear", "matrices", "all"] = "linear"  # weights of Linear layers, tensors of >= 2 dims, all
    clip_norm: PositiveFloat | None = 1.0
    label_smoothing: Fraction = 0.0
    on_nonfinite: Literal["skip", "raise", "stop"] = "skip"  # what a non-finite loss or gradient does
    nonfinite_limit: PositiveInt = 10  # this many in a row end the run under skip
    min_8bit_size: Annotated[int, Field(ge=0)] = 4096  # int8 state: smaller tensors (in values) keep 32 bits
    paged: bool = False  # int8 state in memory that CUDA moves to the CPU when it runs short; the CPU's is there anyway


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
    """Three independent words: what is computed in, what the weights are, what the optimizer keeps.

    `--precision fp32|fp16|bf16|int8|int4` are names for combinations (search_spaces/precisions.py); which of them go
    together is in trainers/compatibility.py.
    """

    compute: Literal["fp32", "fp16", "bf16"] = "fp32"
    weights: Literal["native", "int8", "nf4"] = "native"  # int8: linear layers multiply int8; nf4: a frozen 4-bit base
    optimizer_state: Literal["fp32", "int8"] = "fp32"
    bf16_weights: bool = False  # weights and gradients kept in bf16, updates rounded stochastically; else fp32
    tf32: bool = False  # on CUDA: what is left of fp32 matrix products with 10 bits of mantissa
    adapter_rank: Annotated[int, Field(ge=0)] = 0  # LoRA adapters over frozen weights; 0: all weights are trained
    adapter_alpha: PositiveFloat = 32.0  # adapters count alpha / rank times


class EvaluationConfig(Frozen):
    """Scores the fixed validation text; always at the end of a phase too."""

    every_steps: PositiveInt | None = None
    every_epochs: PositiveFloat | None = 1.0
    every_tokens: PositiveInt | None = None  # over the whole run: at the first step that reaches each multiple
    max_tokens: PositiveInt | None = None  # the first so many validation tokens; None: all of them

    @model_validator(mode="after")
    def _one_cadence(self) -> EvaluationConfig:
        cadences = ("every_steps", "every_epochs", "every_tokens")
        given = [name for name in cadences if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"evaluation: set one of {', '.join(cadences)}; got {' and '.join(given)}.")
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
    at_evaluations: bool = False  # after each evaluation too
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
