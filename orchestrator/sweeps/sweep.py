"""Sweep: which sweep a command means, and whether it may go on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.experiment import SWEEP, confined, write_atomically
from orchestrator.plan import packed_tokens, plan_phase, steps_per_epoch
from orchestrator.sweeps.foreseen import TrialFootprints
from orchestrator.sweeps.journal import JOURNAL
from orchestrator.sweeps.memory_cells import with_largest_batch
from orchestrator.sweeps.searchers import trials_and_points
from orchestrator.sweeps.settings import SweepSettings
from search_spaces.precisions import Device
from search_spaces.space import Space
from trainers.config import RunConfig
from trainers.config_io import differences, dump_yaml, fingerprint_fields
from trainers.data.types import PreparedData
from trainers.deepspeed_config import tuned_by
from trainers.errors import ConfigError, DataError
from trainers.identity import read_json
from trainers.initial import initial_hash

MAY_GROW = "sweep.trials"
SPACE = "sweep.space"


@dataclass(frozen=True)
class SweepRequest:
    """What the command line asked for besides the sweep itself: it changes when and where, not what."""

    runs_dir: Path
    """absolute"""
    typed_runs_dir: Path | None = None
    """where another than the default was named, for commands to paste"""
    name: str | None = None
    concurrent: int | None = None
    gpus_per_trial: float | None = None
    max_seconds: float | None = None
    max_tokens: int | None = None
    max_gpu_hours: float | None = None
    then_train: RunConfig | None = None
    """whose budgets the winner trains on when the search is done; None: it does not"""
    fresh: bool = False
    verbose: bool = False
    json: bool = False
    memory_limit: int | None = None
    """bytes that each worker of a trial may take; None: its part of what is available"""


@dataclass(frozen=True)
class Sweep:
    """A base configuration, what is searched around it, and the folder where that stands."""

    name: str
    folder: Path
    runs_dir: Path
    base: RunConfig
    """budgets in tokens"""
    settings: SweepSettings
    space: Space
    fields: dict[str, Any]
    """what makes it this sweep, flat: the name is refused to another"""
    data_hashes: tuple[str, ...]
    device: Device
    taken_out: tuple[tuple[str, str], ...] = ()
    """(cell, why it cannot start here)"""
    micro_limit: int | None = None
    share: dict[str, int] = field(default_factory=dict)
    """of the cluster for each worker of a trial that has several (`ray_cluster.Resources`)"""
    footprints: TrialFootprints | None = None
    """what its trials were predicted to take; None: nobody asks them"""
    memory_limit: int | None = None
    """bytes that each worker may take; None: whatever there is"""
    typed_runs_dir: Path | None = None
    """`SweepRequest.typed_runs_dir`"""
    shared_identity: dict[str, Any] = field(default_factory=dict)
    """what the identities of all trials have alike: the text and the tokenizer"""

    @property
    def identity(self) -> dict[str, Any]:
        return read_json(self.folder / SWEEP) or {}

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.fields)


def tokens_of_phases(config: RunConfig, data: PreparedData) -> list[int]:
    """Tokens that each phase's budget pays for at the configured batch size."""
    specs = config.resolved_phases()
    lengths = [steps_per_epoch(config, [packed_tokens(source) for source in phase.sources]) for phase in data.phases]
    return [plan_phase(config, spec, length).tokens for spec, length in zip(specs, lengths, strict=True)]


def check_batches(base: RunConfig, space: Space, texts: Sequence[Sequence[int | None]]) -> None:
    """ConfigError where a step of the largest batch is more than the text: packed tokens of its sources, phase by phase
    (None: a stream)."""
    largest = with_largest_batch(base, space)
    if largest is base:
        return
    for spec, tokens in zip(largest.resolved_phases(), texts, strict=True):
        try:
            plan_phase(largest, spec, steps_per_epoch(largest, list(tokens)))
        except DataError as error:
            raise ConfigError(f"batch.sequences={largest.sequences_per_step} of the space: {error}") from None


def notes_of(base: RunConfig, settings: SweepSettings, space: Space) -> list[str]:
    """What a person should know of the trials before they begin. `base`: budgets in tokens."""
    return [note for note in (trials_and_points(settings, space), uneven(base, space)) if note]


def uneven(base: RunConfig, space: Space) -> str | None:
    """A sentence for a person where one step of the largest batch is more than a phase of `base`, whose budgets are in
    tokens, trains on: trials are not compared at equal tokens then."""
    largest = with_largest_batch(base, space)
    step, least = largest.tokens_per_step, min(phase.budget.tokens or 0 for phase in base.resolved_phases())
    if step <= least:
        return None
    return (
        f"one step of batch.sequences={largest.sequences_per_step} takes {step:,} tokens, and a trial is to train on "
        f"{least:,}: such trials train on more than the others; raise the budget, or search smaller batches"
    )


def total_steps_of(config: RunConfig) -> int:
    """Steps of a run whose budgets are in tokens."""
    phases = config.resolved_phases()
    return sum(math.ceil((phase.budget.tokens or 0) / config.tokens_per_step) for phase in phases)


def sweep_fields(base: RunConfig, settings: SweepSettings, data_hashes: tuple[str, ...]) -> dict[str, Any]:
    """Everything that decides what the sweep finds, flat."""
    values = settings.model_dump(mode="json")
    mine = {f"sweep.{name}": json.dumps(value) for name, value in values.items() if name != "space_name"}
    return fingerprint_fields(base, data_hashes, initial_hash(base), tuned_by(base)) | mine


def fingerprint_of(fields: dict[str, Any]) -> str:
    """64 hex digits; the number of trials may grow, so it does not count."""
    counted = {path: value for path, value in fields.items() if path != MAY_GROW}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def settle_name(
    request: SweepRequest, preset: str, settings: SweepSettings, fields: dict[str, Any]
) -> tuple[str, Path]:
    """The sweep's name and folder. Raises ConfigError where the name is another sweep's, listing what differs."""
    short = f"{preset.replace('/', '-')}-{settings.space_name}"
    name = request.name or f"{short}-{fingerprint_of(fields)[:8]}"
    folder = confined(request.runs_dir, name)
    first, number = name, 2
    while request.fresh and folder.exists():
        name, number = f"{first}-{number}", number + 1
        folder = confined(request.runs_dir, name)
    refuse_another(name, folder, fields)
    return name, folder


def refuse_another(name: str, folder: Path, fields: dict[str, Any]) -> None:
    """ConfigError where the folder holds a run, or a sweep of other settings, or of more trials."""
    stored = read_json(folder / SWEEP)
    if stored is None:
        if (folder / "identity.json").exists():
            raise ConfigError(f"{name!r} is the name of a run. Give the sweep another --name.")
        if not (folder / SWEEP).exists() and not _has_trials(folder):
            return
    was = (stored or {}).get("fields")
    if not isinstance(was, dict) or not str(was.get(MAY_GROW)).isdecimal():
        raise ConfigError(
            f"sweep {name!r} is damaged: {folder / SWEEP} does not say what it searches. Put the file back, or give "
            f"this one another --name, or --fresh to start {name}-2."
        )
    if fingerprint_of(was) != fingerprint_of(fields):
        changed = "\n  ".join(_changes(was, fields))
        raise ConfigError(
            f"sweep {name!r} exists with other settings (left: the sweep, right: this command):\n  {changed}\n"
            f"Give this one another --name, or --fresh to start {name}-2, or repeat the sweep's own settings to go on."
        )
    trials, now = int(was[MAY_GROW]), int(fields[MAY_GROW])
    if now < trials:
        raise ConfigError(
            f"sweep {name!r} has {trials} trials and cannot take some back: say --trials {trials} or more."
        )


def _has_trials(folder: Path) -> bool:
    journal = folder / JOURNAL
    return journal.exists() and journal.stat().st_size > 0


def _changes(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each field that differs; of the space, for each path whose domain does."""
    apart = _space_changes(was.get(SPACE), now.get(SPACE))
    held = (MAY_GROW, *([SPACE] if apart else []))
    return [_readable(line) for line in differences(was, now) if not line.startswith(held)] + apart


def _space_changes(was: str | None, now: str | None) -> list[str]:
    """`optim.lr: log 1e-05 .. 0.001 -> log 1e-05 .. 0.01`; none where the two are one, or one cannot be read."""
    try:
        old, new = (Space.from_json(json.loads(text or "")) for text in (was, now))
    except (ValueError, ConfigError):
        return []
    if old == new:
        return []
    lines = [_readable(line) for line in differences(old.describe(), new.describe())]
    return lines or ([f"the space's order: {', '.join(old)} -> {', '.join(new)}"] if [*old] != [*new] else [])


def _readable(line: str) -> str:
    return line if len(line) <= 300 else line[:297] + "..."


def write_sweep(sweep: Sweep, **more: Any) -> None:
    """Write config.yaml and sweep.json (temp + rename); `more` is kept beside what stands there."""
    identity = {
        **sweep.identity,
        "name": sweep.name,
        "fingerprint": sweep.fingerprint,
        "fields": sweep.fields,
        "settings": sweep.settings.model_dump(mode="json"),
        "taken_out": [list(cell) for cell in sweep.taken_out],
        "device": sweep.device,
        **more,
    }
    write_atomically(sweep.folder / "config.yaml", dump_yaml(sweep.base))
    write_atomically(sweep.folder / SWEEP, json.dumps(identity, indent=1) + "\n")
