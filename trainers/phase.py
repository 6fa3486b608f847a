"""ActivePhase: a phase with its loader and its clocks, ready to be stepped through."""

from __future__ import annotations

from dataclasses import dataclass

from trainers.budget import evaluation_interval, phase_steps, reaches_multiple, saving_interval
from trainers.config import CheckpointConfig, Phase, RunConfig
from trainers.data.loader import build_loader
from trainers.data.types import Loader, PhaseData
from trainers.schedules import lr_at


@dataclass(frozen=True)
class ActivePhase:
    spec: Phase
    data: PhaseData
    loader: Loader
    steps: int
    """optimizer updates this phase makes"""
    evaluation_interval: int | None
    """updates between evaluations; None: only at the end, or by tokens"""
    evaluate_every_tokens: int | None
    tokens_per_step: int
    checkpoint: CheckpointConfig

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def draws_noise(self) -> bool:
        return self.spec.model.dropout > 0

    def lr(self, phase_step: int) -> float:
        """Learning rate of the update number `phase_step`, counted from 0 inside the phase."""
        return lr_at(
            self.spec.schedule,
            phase_step,
            total_steps=self.steps,
            base_lr=self.spec.optim.lr,
            steps_per_epoch=self.loader.steps_per_epoch,
        )

    def evaluates_after(self, phase_steps_done: int, steps_done: int) -> bool:
        """Whether an evaluation is due by the steps or epochs of the phase or the tokens of the run."""
        interval, every = self.evaluation_interval, self.evaluate_every_tokens
        if every is not None:
            tokens = steps_done * self.tokens_per_step
            return reaches_multiple(tokens, every=every, tokens_per_step=self.tokens_per_step)
        return interval is not None and phase_steps_done % interval == 0

    def saves_after(self, phase_steps_done: int, steps_done: int, evaluated: bool) -> bool:
        """Whether a checkpoint is due by the configured steps of the run, epochs of the phase, or an evaluation."""
        if evaluated and self.checkpoint.at_evaluations:
            return True
        over_the_run = self.checkpoint.every_steps
        inside = saving_interval(self.checkpoint, self.loader.steps_per_epoch)
        by_steps = over_the_run is not None and steps_done % over_the_run == 0
        return by_steps or (inside is not None and phase_steps_done % inside == 0)


def open_phase(config: RunConfig, spec: Phase, data: PhaseData, rank: int, world_size: int) -> ActivePhase:
    """The phase with its loader at step 0."""
    loader = build_loader(config, spec, data, rank, world_size)
    steps = phase_steps(spec.budget, tokens_per_step=config.tokens_per_step, steps_per_epoch=loader.steps_per_epoch)
    interval = evaluation_interval(config.evaluation, loader.steps_per_epoch)
    every_tokens = config.evaluation.every_tokens
    return ActivePhase(spec, data, loader, steps, interval, every_tokens, config.tokens_per_step, config.checkpoint)
