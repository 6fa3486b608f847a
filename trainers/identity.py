"""Identity: what a run's folder says the run is, and whether a command may go on with it. No torch.

Shared by `orchestrate train` and `python -m trainers`: the one meaning of "the same run".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainers.config import RunConfig
from trainers.errors import ConfigError
from trainers.schedules import budget_can_grow

IDENTITY = "identity.json"
MERGED = "merged"
"""why a run is finished whose weights were put together from those of others"""

_MICRO_BATCH = re.compile(r"batch\.micro_sequences")
_WORKERS = re.compile(r"workers|engine|parallel|deepspeed\.[\w.]+")
_BUDGET = re.compile(r"(phases\.\d+\.)?budget\.\w+")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none (missing or torn)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_identity(run_dir: Path) -> dict[str, Any] | None:
    """identity.json, or None where it is missing, torn or not one of ours."""
    stored = read_json(run_dir / IDENTITY)
    shapes = {"fingerprint": str, "fields": dict, "mlflow_run_id": str, "mlflow_phase_run_ids": dict}
    if stored is None or not {"fingerprint", "fields"} <= stored.keys():
        return None
    return stored if all(isinstance(stored[key], kind) for key, kind in shapes.items() if key in stored) else None


def stored_identity(run_dir: Path, way_out: str) -> dict[str, Any] | None:
    """identity.json of a run that is there, None where none has begun.

    ConfigError, which ends in `way_out`, where checkpoints stand that nobody can tell the run of.
    """
    stored = read_identity(run_dir)
    checkpoints = run_dir / "checkpoints"
    if stored is None and checkpoints.is_dir() and any(checkpoints.glob("step-*")):
        raise ConfigError(f"{run_dir} holds checkpoints but no readable {IDENTITY}: {way_out}")
    return stored


def saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint that stands there, sound or not; 0 where there is none."""
    names = (path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def only_more_budget(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """The same run but for a larger budget, counted in the same unit; both are `fingerprint_fields`."""
    changed = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    return all(
        _BUDGET.fullmatch(key)
        and isinstance(old.get(key), int | float)
        and isinstance(new.get(key), int | float)
        and new[key] > old[key]
        for key in changed
    )


def with_micro_batch_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`fingerprint_fields` of a run as if it had begun with the micro-batch of `new`.

    The rows of a step stay; memory decides in how many pieces they are taken. Sums are rounded otherwise, and dropout
    draws other masks.
    """
    return _with_fields_of(new, _MICRO_BATCH, old)


def with_workers_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`fingerprint_fields` of a run as if it had begun with the workers and the engine of `new`.

    What is computed stays, but for the order of sums and the masks of dropout.
    """
    return _with_fields_of(new, _WORKERS, old)


def _with_fields_of(new: Mapping[str, Any], fields: re.Pattern[str], old: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in old.items() if not fields.fullmatch(key)}
    return kept | {key: value for key, value in new.items() if fields.fullmatch(key)}


def refuse_more_after_its_end(name: str, outcome: Mapping[str, Any] | None, start: str) -> None:
    """ConfigError where the run `name` cannot be trained further because of how it ended; `start` says how to begin
    another from its weights."""
    reason = outcome.get("reason") if outcome else None
    if reason == MERGED:
        raise ConfigError(
            f"run {name!r} was put together by `orchestrate merge`: it has weights and no optimizer state to go on "
            f"with. Start a new run from its weights: {start}."
        )
    if reason == "early_stopping":
        raise ConfigError(
            f"run {name!r} was ended by early stopping, not by its budget, so a larger budget changes nothing. "
            f"Start a new run from its weights: {start} early_stopping.patience=0."
        )


def refuse_rewritten_past(config: RunConfig, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """ConfigError where steps already taken would have been others under the larger budget of `config`."""
    for phase in config.resolved_phases():
        inherits = bool(config.phases) and config.phases[phase.index].budget is None
        own = "budget." if inherits or not config.phases else f"phases.{phase.index}.budget."
        if not any(key.startswith(own) and old.get(key) != value for key, value in new.items()):
            continue
        if phase.index + 1 < len(config.phases):
            raise ConfigError(
                f"the budget of phase {phase.name!r} cannot be raised: {config.phases[phase.index + 1].name!r} comes "
                f"after it, and only the last phase can go on. Start a new run with the larger budget."
            )
        allowed, reason = budget_can_grow(phase.schedule)
        if not allowed:
            raise ConfigError(f"the budget of phase {phase.name!r} cannot be raised: {reason}")
