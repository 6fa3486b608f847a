"""The winning command: what to type to use what a sweep found; how the weights of a population's winner came about."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from orchestrator.sweeps.history import History, Params, Trial, seed_names
from orchestrator.sweeps.trials import run_of
from trainers.config import EXCLUSIVE, RunConfig
from trainers.config_io import build_config
from trainers.errors import ConfigError
from trainers.presets import PRESETS

if TYPE_CHECKING:
    from orchestrator.sweeps.sweep import Sweep

CADENCE = ("seed", "evaluation", "early_stopping", "checkpoint", "samples")
"""what a trial has for the sake of the sweep"""


def command_of(sweep: Sweep, trial: Trial) -> str:
    """`orchestrate train` with the trial's settings and the sweep's budget, ready to paste.

    Of a population `orchestrate generate` with the weights that won: no training with the last settings makes them.
    """
    where = [] if sweep.typed_runs_dir is None else ["--runs-dir", str(sweep.typed_runs_dir)]
    if sweep.settings.scheduler == "pbt":
        return shlex.join(["orchestrate", "generate", weights_of(sweep, trial), *where])
    preset = sweep.base.preset
    target = preset if preset in PRESETS else str(sweep.folder / "config.yaml")
    return shlex.join(["orchestrate", "train", target, *overrides_of(sweep, trial), *where])


def weights_of(sweep: Sweep, trial: Trial) -> str:
    """The run with a member's weights, as generate, evaluate and --init-from take it."""
    return f"{sweep.name}/{seed_names(trial.number, 1, len(trial.lineage))[0]}"


def lineage_of(sweep: Sweep, history: History, trial: Trial) -> str:
    """How a member's weights came about, in words."""
    legs = [
        f"{name}{f' from {tokens:,} tokens' if tokens else ''} with "
        + ", ".join(f"{path}={value}" for path, value in params.items())
        for tokens, name, params in course_of(history, trial)
    ]
    return (
        f"Trained as {', then '.join(legs)}. {weights_of(sweep, trial)} has the weights, for generate or --init-from: "
        "the last settings alone would not make them again."
    )


def course_of(history: History, trial: Trial, until: float = math.inf) -> list[tuple[int, str, Params]]:
    """(from tokens, member, settings) for each stretch of the training that made the weights which a member had at
    `until`, through those that it took them from."""
    taken = [exploit for exploit in trial.lineage if exploit.tokens < until]
    if not taken:
        return [(0, trial.name, trial.began)]
    last = taken[-1]
    before = course_of(history, history.trials[last.parent], last.tokens)
    return [*before, (last.tokens, trial.name, last.params)]


def check_can_train(scheduler: str) -> None:
    """ConfigError where no training from scratch is what won (--then-train)."""
    if scheduler == "pbt":
        raise ConfigError(
            "--then-train trains from scratch with the winner's settings, and what wins with scheduler=pbt are weights "
            "that were trained while these changed: leave it out, and use those weights."
        )


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
