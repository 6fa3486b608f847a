"""ActivePhase: a phase with its loader and its clocks, ready to be stepped through."""

from __future__ import annotations

from dataclasses import dataclass

from trainers.budget import evaluation_interval, phase_steps, saving_interval
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
    """updates between evaluations; None: only at the end"""
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

    def evaluates_after(self, phase_steps_done: int) -> bool:
        interval = self.evaluation_interval
        return interval is not None and phase_steps_done % interval == 0

    def saves_after(self, phase_steps_done: int, steps_done: int) -> bool:
        """Whether a checkpoint is due by the configured steps of the run or epochs of the phase."""
        over_the_run = self.checkpoint.every_steps
        inside = saving_interval(self.checkpoint, self.loader.steps_per_epoch)
        by_steps = over_the_run is not None and steps_done % over_the_run == 0
        return by_steps or (inside is not None and phase_steps_done % inside == 0)


def open_phase(config: RunConfig, spec: Phase, data: PhaseData, rank: int, world_size: int) -> ActivePhase:
    """The phase with its loader at step 0."""
    loader = build_loader(config, spec, data, rank, world_size)
    steps = phase_steps(spec.budget, tokens_per_step=config.tokens_per_step, steps_per_epoch=loader.steps_per_epoch)
    interval = evaluation_interval(config.evaluation, loader.steps_per_epoch)
    return ActivePhase(spec, data, loader, steps, interval, config.checkpoint)
