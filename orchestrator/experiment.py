"""Identity: which run a command means, and whether it may go on."""

from __future__ import annotations

import json
import os
import re
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainers.config import NAME_PATTERN, RunConfig
from trainers.config_io import differences, dump_yaml, fingerprint, fingerprint_fields
from trainers.errors import ConfigError, UserError
from trainers.initial import initial_hash

IDENTITY = "identity.json"
OUTCOME = "outcome.json"
FOLDERS = ("checkpoints", "logs", "plots", "samples", "tokenizer")
ENDINGS = ("finished", "stopped", "failed")
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """What the command line asked for besides the configuration."""

    runs_dir: Path
    name: str | None = None
    fresh: bool = False
    verbose: bool = False
    json: bool = False
    overrides: tuple[str, ...] = ()
    extending: bool = False
    """the target was the name of an existing run"""


@dataclass(frozen=True)
class Experiment:
    """A configuration with the folder and the identity it trains under."""

    name: str
    run_dir: Path
    config: RunConfig
    fingerprint: str
    fields: dict[str, Any]
    known: bool
    """the folder already holds this run"""
    extended: bool
    """its budget was raised"""

    @property
    def identity(self) -> dict[str, Any]:
        return _read_identity(self.run_dir) or {}

    @property
    def outcome(self) -> dict[str, Any] | None:
        """How the run ended last, or None when it has not (or was killed)."""
        found = read_json(self.run_dir / OUTCOME)
        return {"reason": "", **found} if found and found.get("state") in ENDINGS else None


def settle(config: RunConfig, request: Request, data_hashes: tuple[str, ...]) -> Experiment:
    """The run that `config` under `request` means; reads only.

    Raises ConfigError when the name is taken by a run with another fingerprint, listing the fields.
    """
    start = initial_hash(config)
    fields, digest = fingerprint_fields(config, data_hashes, start), fingerprint(config, data_hashes, start)
    name = request.name or f"{config.preset.replace('/', '-')}-{digest[:8]}"
    run_dir = confined(request.runs_dir, name)
    if request.fresh and run_dir.exists():
        name, run_dir = _next_free(request.runs_dir, name)
    _refuse_other_than_folders(run_dir)
    stored = _stored_identity(run_dir)
    experiment = Experiment(name, run_dir, config, digest, fields, stored is not None, extended=False)
    if stored is None or stored["fingerprint"] == digest:
        return experiment
    if _only_more_budget(stored["fields"], fields):
        if (experiment.outcome or {}).get("reason") == "early_stopping":
            raise ConfigError(
                f"run {name!r} was ended by early stopping, not by its budget, so a larger budget changes nothing. "
                f"Start a new run from its weights: --init-from {name} early_stopping.patience=0."
            )
        _refuse_rewritten_past(config, stored["fields"], fields)
        return replace(experiment, extended=True)
    changed = "\n  ".join(differences(stored["fields"], fields))
    raise ConfigError(
        f"run {name!r} exists with another configuration (left: the run, right: this command):\n  {changed}\n"
        f"Give this one another --name, or --fresh to start {name}-2, or repeat the run's own settings to continue it."
    )


def confined(runs_dir: Path, name: str) -> Path:
    """The folder of run `name`, surely inside `runs_dir`. Raises ConfigError for a name that could lead elsewhere."""
    if not NAME_PATTERN.fullmatch(name) or RESERVED.fullmatch(name):
        shown = name if len(name) <= 60 else name[:57] + "..."
        raise ConfigError(
            f"a run name is 1 to 128 letters, digits, '.', '_' or '-', starts with a letter or digit and is no "
            f"device name; got {shown!r} ({len(name)} characters)."
        )
    run_dir = runs_dir / name
    if run_dir.is_symlink() or not run_dir.resolve().is_relative_to(runs_dir.resolve()):
        raise ConfigError(f"{run_dir} is a link: a run's folder must lie inside the runs folder. Remove the link.")
    return run_dir


def write_identity(experiment: Experiment, **more: Any) -> None:
    """Write config.yaml and identity.json (temp + rename); `more` is kept beside what stands there."""
    identity = {
        **experiment.identity,
        "created": experiment.identity.get("created") or datetime.now(UTC).isoformat(timespec="seconds"),
        "name": experiment.name,
        "fingerprint": experiment.fingerprint,
        "fields": experiment.fields,
        **more,
    }
    write_atomically(experiment.run_dir / "config.yaml", dump_yaml(experiment.config))
    write_atomically(experiment.run_dir / IDENTITY, json.dumps(identity, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Either the old content or the new one, whatever is killed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror}. Free some space or choose another --runs-dir."
        ) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none (missing or torn)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_identity(run_dir: Path) -> dict[str, Any] | None:
    """identity.json, or None where it is missing, torn or not one of ours."""
    stored = read_json(run_dir / IDENTITY)
    shapes = {"fingerprint": str, "fields": dict, "mlflow_run_id": str, "mlflow_phase_run_ids": dict}
    if stored is None or not {"fingerprint", "fields"} <= stored.keys():
        return None
    return stored if all(isinstance(stored[key], kind) for key, kind in shapes.items() if key in stored) else None


def _stored_identity(run_dir: Path) -> dict[str, Any] | None:
    stored = _read_identity(run_dir)
    if stored is not None:
        return stored
    if (run_dir / "checkpoints").is_dir() and any((run_dir / "checkpoints").glob("step-*")):
        raise ConfigError(
            f"{run_dir} holds checkpoints but no readable {IDENTITY}: move it away or choose another --name."
        )
    return None


def _refuse_other_than_folders(run_dir: Path) -> None:
    """Else a whole training would end at its first save."""
    for name in FOLDERS:
        path = run_dir / name
        if os.path.lexists(path) and not path.is_dir():
            raise ConfigError(f"{path} is no folder, and the run needs one of that name: move it away.")


def _next_free(runs_dir: Path, name: str) -> tuple[str, Path]:
    number = 2
    while confined(runs_dir, f"{name}-{number}").exists():
        number += 1
    return f"{name}-{number}", runs_dir / f"{name}-{number}"


def _only_more_budget(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """The same run but for a larger budget, counted in the same unit."""
    changed = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    return all(
        re.fullmatch(r"(phases\.\w+\.)?budget\.\w+", key)
        and isinstance(old.get(key), int | float)
        and isinstance(new.get(key), int | float)
        and new[key] > old[key]
        for key in changed
    )


def _refuse_rewritten_past(config: RunConfig, old: dict[str, Any], new: dict[str, Any]) -> None:
    """ConfigError where steps already taken would have been others under the larger budget."""
    from trainers.schedules import budget_can_grow

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
