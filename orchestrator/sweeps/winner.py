"""The winning command: what to type to train with the settings that a sweep found."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from orchestrator.sweeps.history import Trial
from orchestrator.sweeps.trials import run_of
from trainers.config import EXCLUSIVE, RunConfig
from trainers.config_io import build_config
from trainers.presets import PRESETS

if TYPE_CHECKING:
    from orchestrator.sweeps.sweep import Sweep

CADENCE = ("seed", "evaluation", "early_stopping", "checkpoint", "samples")
"""what a trial has for the sake of the sweep"""


def command_of(sweep: Sweep, trial: Trial) -> str:
    """`orchestrate train` with the trial's settings and the sweep's budget, ready to paste."""
    preset = sweep.base.preset
    target = preset if preset in PRESETS else str(sweep.folder / "config.yaml")
    return shlex.join(["orchestrate", "train", target, *overrides_of(sweep, trial)])


def overrides_of(sweep: Sweep, trial: Trial) -> list[str]:
    """What turns the preset (the sweep's own configuration, where it has no preset) into the winning run."""
    preset = PRESETS.get(sweep.base.preset)
    start = preset() if preset else sweep.base
    now = winning_run(sweep, trial)
    changes = _changes(start.model_dump(mode="json"), now.model_dump(mode="json"))
    return [f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in changes]


def winning_run(sweep: Sweep, trial: Trial) -> RunConfig:
    """The trial's run, evaluated, saved and stopped as the sweep's base says."""
    base = sweep.base.model_dump(mode="json")
    values = run_of(sweep.base, trial.params, sweep.settings, micro_limit=sweep.micro_limit).model_dump(mode="json")
    values |= {name: base[name] for name in CADENCE}
    for part, was in [(values, base), *zip(values["phases"], base["phases"], strict=True)]:
        if part["optim"] is not None:
            part["optim"]["on_nonfinite"] = (was["optim"] or base["optim"])["on_nonfinite"]
    return build_config(values)


def _changes(was: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of what differs; a list of another length is one value."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in now:
            if not _cleared_by_rival(key, now):
                yield from _changes(was.get(key), now[key], f"{path}.{key}" if path else key)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now) and _parts(now):
        for index, (before, after) in enumerate(zip(was, now, strict=True)):
            yield from _changes(before, after, f"{path}.{index}")
    elif was != now:
        yield path, now


def _parts(values: list[Any]) -> bool:
    return any(isinstance(value, dict) for value in values)


def _cleared_by_rival(key: str, section: dict[str, Any]) -> bool:
    """Whether setting another field of the section clears this one."""
    groups = [group for group in EXCLUSIVE.values() if key in group and section.keys() >= set(group)]
    return section[key] is None and any(section[rival] is not None for group in groups for rival in group)
