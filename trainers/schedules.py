"""Learning rates as pure functions of the configuration and the step. No torch."""

from __future__ import annotations

import math

from trainers.config import ScheduleConfig
from trainers.errors import ConfigError


def lr_at(
    schedule: ScheduleConfig, step: int, *, total_steps: int, base_lr: float, steps_per_epoch: int | None
) -> float:
    """The learning rate of update number `step` (counted from 0) of a phase of `total_steps` updates.

    Warm-up of w updates: update number s takes (s + 1) / w of the rate, so that the k-th update made (k = s + 1)
    has k / w, none has 0, and the last of the warm-up has the full rate. The shape then starts at the full rate with
    update w and, for linear, cosine and wsd, ends at `min_lr_ratio` of it with update total_steps - 1; beyond that
    it stays there. ConfigError when epochs are asked of a corpus whose length nobody knows (`steps_per_epoch` None).
    """
    if step < schedule.warmup_steps:
        return base_lr * ((step + 1) / schedule.warmup_steps)
    return base_lr * _shape(schedule, step, total_steps, steps_per_epoch)


def _shape(schedule: ScheduleConfig, step: int, total_steps: int, steps_per_epoch: int | None) -> float:
    since = step - schedule.warmup_steps  # 0 at the first update after the warm-up
    floor = schedule.min_lr_ratio
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "inverse_sqrt":  # Vaswani et al. 2017, section 5.3
        reference = max(1, schedule.warmup_steps)
        return math.sqrt(reference / (reference + since))
    if schedule.kind == "step":
        return max(floor, schedule.gamma ** math.floor(since / _interval(schedule, steps_per_epoch) + 1e-9))
    if schedule.kind == "wsd":  # warm-up, stable, decay: Hu et al. 2024 (MiniCPM)
        start = max(schedule.warmup_steps, total_steps - max(1, round(schedule.decay_fraction * total_steps)))
        progress = (step - start + 1) / max(1, total_steps - start)
        return 1.0 - (1.0 - floor) * min(1.0, max(0.0, progress))
    progress = min(1.0, since / max(1, total_steps - schedule.warmup_steps - 1))
    if schedule.kind == "linear":
        return 1.0 - (1.0 - floor) * progress
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _interval(schedule: ScheduleConfig, steps_per_epoch: int | None) -> float:
    if schedule.step_unit == "steps":
        return schedule.step_size
    if steps_per_epoch is None:
        raise ConfigError(
            f"schedule.kind=step with step_size={schedule.step_size:g} epochs needs a corpus of known length, and a "
            f"streaming one has none: set schedule.step_unit=steps and schedule.step_size to a number of steps."
        )
    return schedule.step_size * steps_per_epoch


def endless_warmup(schedule: ScheduleConfig, total_steps: int) -> str | None:
    """A sentence for the person where a phase of `total_steps` updates ends before its warm-up does; else None."""
    if schedule.warmup_steps <= total_steps:
        return None
    return (
        f"schedule.warmup_steps ({schedule.warmup_steps:,}) is more than the {total_steps:,} steps of the budget: the "
        f"learning rate ends at {total_steps / schedule.warmup_steps:.0%} of optim.lr. Lower schedule.warmup_steps or "
        f"raise the budget."
    )


def budget_can_grow(schedule: ScheduleConfig) -> tuple[bool, str]:
    """Whether a run under `schedule` may get a larger budget, and the reason to show where it may not.

    It may when the rates of the steps already taken do not depend on the total.
    """
    if schedule.kind in ("constant", "inverse_sqrt", "step"):
        return True, ""
    ends = "starts its decay so many steps before the end" if schedule.kind == "wsd" else "reaches its floor at the end"
    return False, (
        f"schedule.kind={schedule.kind} {ends} of the budget, so a larger budget would have given the steps already "
        f"taken another learning rate. Start a new run with the larger budget (or from these weights with "
        f"--init-from), or use schedule.kind=constant, step or inverse_sqrt, whose curve does not depend on it."
    )
