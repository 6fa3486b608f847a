"""RunConfig: one frozen value that describes a run completely, made of the parts of config_model, config_data and
config_training.

Imports no torch, so that a configuration is valid or invalid alike on every machine, in milliseconds.
Field comments say what a value means; a default is what a newcomer should get.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainers.compatibility import conflicts
from trainers.config_data import DataConfig, SourceConfig, SplitConfig, TokenizerConfig
from trainers.config_engine import DeepSpeedConfig, EngineName, ParallelName, engine_conflicts
from trainers.config_fields import NAME_PATTERN, Frozen, PositiveInt
from trainers.config_model import ModelConfig, ModelSwitches
from trainers.config_training import (
    BatchConfig,
    BudgetConfig,
    CheckpointConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimConfig,
    PrecisionConfig,
    SampleConfig,
    ScheduleConfig,
)

__all__ = [
    "EXCLUSIVE",
    "NAME_PATTERN",
    "BatchConfig",
    "BudgetConfig",
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "EarlyStoppingConfig",
    "EvaluationConfig",
    "Frozen",
    "LoggingConfig",
    "ModelConfig",
    "ModelSwitches",
    "OptimConfig",
    "Phase",
    "PhaseConfig",
    "PrecisionConfig",
    "RunConfig",
    "SampleConfig",
    "ScheduleConfig",
    "SourceConfig",
    "SplitConfig",
    "TokenizerConfig",
    "epochs_to_steps",
]


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
    engine: EngineName = "torch"  # who takes the steps
    parallel: ParallelName = "ddp"  # several workers of engine=torch: a copy on each, or fsdp: a slice (FSDP2)
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()  # engine=deepspeed
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
    def _precision_fits_together(self) -> RunConfig:
        optims = [self.optim, *(phase.optim for phase in self.phases if phase.optim is not None)]
        found = conflicts(self.precision, optims, device=self.device, init_from=self.init_from)
        if found:
            raise ValueError("\n".join(found))
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> RunConfig:
        if self.engine == "torch" and self.parallel == "ddp" and self.deepspeed == DeepSpeedConfig():
            return self
        found = engine_conflicts(self)
        if found:
            raise ValueError("\n".join(found))
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
    EvaluationConfig: ("every_steps", "every_epochs", "every_tokens"),
}


def epochs_to_steps(epochs: float, steps_per_epoch: int) -> int:
    """Optimizer updates in so many passes, at least one."""
    return max(1, math.floor(epochs * steps_per_epoch + 1e-9))
