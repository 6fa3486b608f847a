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

from trainers.claim import holder
from trainers.config import NAME_PATTERN, RunConfig
from trainers.config_io import differences, dump_yaml, fingerprint, fingerprint_fields
from trainers.deepspeed_config import tuned_by
from trainers.errors import ConfigError, UserError
from trainers.identity import (
    IDENTITY,
    only_more_budget,
    read_identity,
    read_json,
    refuse_more_after_its_end,
    refuse_rewritten_past,
    stored_identity,
    with_micro_batch_of,
    with_workers_of,
)
from trainers.initial import initial_hash

OUTCOME = "outcome.json"
SWEEP = "sweep.json"
"""makes a folder a sweep, whose trials are the runs"""
FOLDERS = ("checkpoints", "logs", "plots", "samples", "tokenizer")
ENDINGS = ("finished", "stopped", "failed")
OF_THE_STORE = re.compile(r"mlflow\.db(-\w+)?|mlartifacts|mlruns", re.IGNORECASE)
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """What the command line asked for besides the configuration."""

    runs_dir: Path
    name: str | None = None
    fresh: bool = False
    reshape: bool = False
    """go on with the workers and the engine of this command, whatever the run began with"""
    verbose: bool = False
    json: bool = False
    document: dict[str, Any] | None = None
    """what else --json prints, of the sweep that this run follows; the run is its `training`"""
    memory_limit: int | None = None
    """bytes that each worker may take; None: whatever there is"""
    shrinks: bool = False
    """a run that runs out of memory goes on with smaller micro-batches"""


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
    stood_as: str | None = None
    """the fingerprint of the run that goes on with another micro-batch, or with other workers"""
    passed_over: tuple[Path, ...] = ()
    """folders of runs of this name that --fresh leaves as they are"""

    @property
    def identity(self) -> dict[str, Any]:
        return read_identity(self.run_dir) or {}

    @property
    def outcome(self) -> dict[str, Any] | None:
        """How the run ended last, or None when it has not (or was killed)."""
        found = read_json(self.run_dir / OUTCOME)
        return {"reason": "", **found} if found and found.get("state") in ENDINGS else None


def cache_dir(runs_dir: Path) -> Path:
    """Packed corpora and tokenizers, shared by the runs of a folder."""
    return runs_dir / ".cache"


def settle(config: RunConfig, request: Request, data_hashes: tuple[str, ...]) -> Experiment:
    """The run that `config` under `request` means; reads only.

    Raises ConfigError when the name is taken by a run with another fingerprint, listing the fields.
    """
    start, tuned = initial_hash(config, _own_folder(request)), tuned_by(config)
    fields = fingerprint_fields(config, data_hashes, start, tuned)
    digest = fingerprint(config, data_hashes, start, tuned)
    name = request.name or f"{config.preset.replace('/', '-')}-{digest[:8]}"
    run_dir = confined(request.runs_dir, name)
    taken: list[Path] = []
    if request.fresh:
        *taken, run_dir = _until_free(request.runs_dir, name)
        name = run_dir.name
    refuse_sweep(run_dir)
    _refuse_other_than_folders(run_dir)
    stored = stored_identity(run_dir, "move it away or choose another --name.")
    experiment = Experiment(name, run_dir, config, digest, fields, stored is not None, False, passed_over=tuple(taken))
    if stored is None or stored["fingerprint"] == digest:
        return experiment
    before = with_micro_batch_of(stored["fields"], fields)
    if request.reshape:
        before = with_workers_of(before, fields)
    if before == fields:
        return replace(experiment, stood_as=stored["fingerprint"])
    if only_more_budget(before, fields):
        refuse_more_after_its_end(name, experiment.outcome, f"--init-from {name}")
        refuse_rewritten_past(config, before, fields)
        return replace(experiment, extended=True)
    only_workers = only_more_budget(with_workers_of(before, fields), fields)
    way_out = ", or --reshape to continue it with these workers" if only_workers else ""
    changed = "\n  ".join(differences(stored["fields"], fields))
    raise ConfigError(
        f"run {name!r} exists with another configuration (left: the run, right: this command):\n  {changed}\n"
        f"Give this one another --name, or --fresh to start {name}-2, or repeat the run's own settings to continue it"
        f"{way_out}."
    )


def confined(runs_dir: Path, name: str) -> Path:
    """The folder of run `name`, surely inside `runs_dir`. Raises ConfigError for a name that could lead elsewhere."""
    if not NAME_PATTERN.fullmatch(name) or RESERVED.fullmatch(name):
        shown = name if len(name) <= 60 else name[:57] + "..."
        raise ConfigError(
            f"a run name is 1 to 128 letters, digits, '.', '_' or '-', starts with a letter or digit and is no "
            f"device name; got {shown!r} ({len(name)} characters)."
        )
    if OF_THE_STORE.fullmatch(name):
        raise ConfigError(f"{name!r} is where the MLflow store of the runs folder lies: choose another --name.")
    run_dir = runs_dir / name
    if run_dir.is_symlink() or not run_dir.resolve().is_relative_to(runs_dir.resolve()):
        raise ConfigError(f"{run_dir} is a link: a run's folder must lie inside the runs folder. Remove the link.")
    return run_dir


def refuse_sweep(run_dir: Path) -> None:
    """ConfigError where the folder that a run is to have is a sweep's."""
    if (run_dir / SWEEP).exists():
        raise ConfigError(f"{run_dir.name!r} is the name of a sweep. Give the run another --name.")


def write_identity(experiment: Experiment, **more: Any) -> None:
    """Write config.yaml and identity.json (temp + rename); `more` is kept beside what stands there."""
    write_atomically(experiment.run_dir / "config.yaml", dump_yaml(experiment.config))
    amend_identity(experiment, **more)


def amend_identity(experiment: Experiment, **more: Any) -> None:
    """Write identity.json alone, with `more` beside what stands there."""
    identity = {
        **experiment.identity,
        "created": experiment.identity.get("created") or datetime.now(UTC).isoformat(timespec="seconds"),
        "name": experiment.name,
        "fingerprint": experiment.fingerprint,
        "fields": experiment.fields,
        "init_from": experiment.config.init_from,
        **more,
    }
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


def _refuse_other_than_folders(run_dir: Path) -> None:
    """Else a whole training would end at its first save."""
    for name in FOLDERS:
        path = run_dir / name
        if os.path.lexists(path) and not path.is_dir():
            raise ConfigError(f"{path} is no folder, and the run needs one of that name: move it away.")


def _until_free(runs_dir: Path, name: str) -> list[Path]:
    """The folders of NAME, NAME-2 and so on that are there, and the first that is not."""
    folders = [confined(runs_dir, name)]
    while folders[-1].exists():
        folders.append(confined(runs_dir, f"{name}-{len(folders) + 1}"))
    return folders


def _own_folder(request: Request) -> Path | None:
    """Where the run goes on, if it is one that was begun: it remembers what it started from."""
    return confined(request.runs_dir, request.name) if request.name and not request.fresh else None


def abandoned(run_dir: Path) -> str | None:
    """The MLflow run id of a run whose driver was killed: it has no ending, and nobody holds it. Else None."""
    ended = read_json(run_dir / OUTCOME) is not None
    keeper = holder(run_dir)
    if ended or keeper is None or keeper.alive is not False:
        return None
    return (read_identity(run_dir) or {}).get("mlflow_run_id")
