"""SeedTraining: one training of a trial as the driver holds it: its folder, its claim and its MLflow run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from orchestrator.experiment import OUTCOME, Experiment, cache_dir, write_identity
from orchestrator.provenance import describe_environment
from orchestrator.sweeps.foreseen import TrialFootprints
from orchestrator.sweeps.history import Ending, Exploit, History, StopReason, Trial, seed_names, trial_name
from orchestrator.sweeps.sweep import Sweep, total_steps_of
from orchestrator.sweeps.trials import run_of
from orchestrator.tracker import Nested, OpeningStore, Tracker
from trainers.claim import Claim
from trainers.config import RunConfig
from trainers.config_io import build_config, fingerprint, fingerprint_fields, read_yaml
from trainers.context import STOP_REQUEST, request_stop
from trainers.deepspeed_config import tuned_by
from trainers.identity import read_identity, read_json
from trainers.initial import initial_hash

EXPLOITED = "exploited"
"""why a member's training ends when it takes over another's checkpoint"""


class SeedTraining:
    """Made by `open_trial`; the claim and the MLflow run are held until `close`."""

    def __init__(
        self,
        experiment: Experiment,
        claim: Claim,
        tracker: Tracker,
        job: dict[str, Any],
        seeds: int,
        footprints: TrialFootprints | None = None,
    ):
        self.folder = experiment.run_dir
        self._config, self._footprints = experiment.config, footprints
        self.job = job
        """what the actor gets"""
        self._claim, self._tracker, self._seeds = claim, tracker, seeds

    def request_stop(self, reason: StopReason) -> None:
        request_stop(self.folder, self._claim.generation, reason)

    def close(self, reason: str, ending: Ending | None) -> None:
        """End the MLflow run as the trial ended and let the folder go. `ending`: None where the trial can go on."""
        outcome = read_json(self.folder / OUTCOME) or {"state": "failed", "reason": reason}
        if reason in ("nonfinite", "oom", "error"):
            outcome["state"] = "failed"
        elif reason != "completed":
            outcome["state"] = "stopped"
        try:
            if ending is not None:
                predicted = self._predicted() if outcome["state"] == "finished" else {}
                self._tracker.log_last(told(ending, self._seeds) | predicted)
            self._tracker.close({**outcome, "stop_reason": reason})
        finally:
            self._claim.release()

    def _predicted(self) -> dict[str, float]:
        """What a plan says of a training that has been measured (mem/peak_gib); the measurement teaches the next."""
        return {} if self._footprints is None else self._footprints.of(self.folder, self._config)


def open_trial(
    sweep: Sweep, trial: Trial, opening: OpeningStore, parent_run_id: str, say: Callable[[str], None]
) -> list[SeedTraining]:
    """A training for each seed of the trial, begun or gone on with.

    Raises ConfigError where the point makes no run, StoreAway where MLflow does not answer; then nothing is held.
    """
    settings = sweep.settings
    configs = [
        run_of(sweep.base, trial.params, settings, seed_index=index, micro_limit=sweep.micro_limit)
        for index in range(settings.seeds)
    ]
    seeds: list[SeedTraining] = []
    names = seed_names(trial.number, settings.seeds, len(trial.lineage))
    with contextlib.ExitStack() as opened:
        for index, (name, config) in enumerate(zip(names, configs, strict=True)):
            what = (config, sweep.data_hashes, initial_hash(config), tuned_by(config))
            experiment = _experiment(sweep, name, config, fingerprint(*what), fingerprint_fields(*what))
            claim = opened.enter_context(Claim.acquire(experiment.run_dir, say=say))
            (experiment.run_dir / STOP_REQUEST).unlink(missing_ok=True)
            (experiment.run_dir / "logs").mkdir(exist_ok=True)
            write_identity(experiment, total_steps=total_steps_of(config), **sweep.shared_identity)
            nested = Nested(parent_run_id, tags_of(sweep, trial, name, index), is_new=claim.generation == 1)
            tracker = Tracker(experiment, opening, say, nested)
            tracker.open()
            job = _job(sweep, experiment, claim)
            seeds.append(SeedTraining(experiment, claim, tracker, job, settings.seeds, sweep.footprints))
            opened.callback(seeds[-1].close, "user", None)
        opened.pop_all()
    return seeds


def settle(
    sweep: Sweep, history: History, opening: OpeningStore, parent_run_id: str, say: Callable[[str], None]
) -> None:
    """Tell MLflow what a driver owed it when it was killed or the store was away: the ends of trials that are over, and
    of what members of a population trained before they took over from another. Raises StoreAway while it is away."""
    for name, reason, ending in _over(sweep, history):
        identity = read_identity(sweep.folder / name)
        if identity is None or "mlflow_run_id" not in identity or identity.get("mlflow_ended"):
            continue
        config = build_config(read_yaml(sweep.folder / name / "config.yaml"))
        experiment = _experiment(sweep, name, config, identity["fingerprint"], identity["fields"])
        with Claim.acquire(experiment.run_dir, say=say) as claim:
            tracker = Tracker(experiment, opening, say, Nested(parent_run_id, {}, is_new=False))
            tracker.open()
            SeedTraining(experiment, claim, tracker, {}, sweep.settings.seeds).close(reason, ending)
        if ending is None or reason != "completed":
            shutil.rmtree(experiment.run_dir / "checkpoints", ignore_errors=True)


def owes(sweep: Sweep, history: History) -> bool:
    """Whether `settle` has something to do."""
    found = (read_identity(sweep.folder / name) for name, _, _ in _over(sweep, history))
    return any(identity and "mlflow_run_id" in identity and not identity.get("mlflow_ended") for identity in found)


def _over(sweep: Sweep, history: History) -> Iterator[tuple[str, str, Ending | None]]:
    """(folder, why it ended, the trial's ending) of every training that will not go on."""
    for trial in history.trials.values():
        for segment in range(len(trial.lineage)):
            yield seed_names(trial.number, 1, segment)[0], EXPLOITED, None
        if trial.ending is not None:
            for name in seed_names(trial.number, sweep.settings.seeds, len(trial.lineage)):
                yield name, trial.ending.reason, trial.ending


def _experiment(sweep: Sweep, name: str, config: RunConfig, digest: str, fields: dict[str, Any]) -> Experiment:
    return Experiment(f"{sweep.name}/{name}", sweep.folder / name, config, digest, fields, known=False, extended=False)


def tags_of(sweep: Sweep, trial: Trial, name: str, seed_index: int) -> dict[str, str]:
    return {
        **_environment(),
        "kind": "trial",
        "sweep": sweep.name,
        "trial": name,
        "trial.point": str(trial.number),
        "trial.seed_index": str(seed_index),
        "trial.params": json.dumps(trial.params),
        **({"trial.segment": str(len(trial.lineage)), "trial.parent": trial_name(trial.lineage[-1].parent)}
           if trial.lineage else {}),
    }  # fmt: skip


@cache
def _environment() -> dict[str, str]:
    """Commit, versions and machine are those of the driver: asked for once, not for every trial."""
    return describe_environment()


def take_over(sweep: Sweep, history: History, exploit: Exploit) -> None:
    """Give a member's next folder the newest checkpoint of its parent, by links; again does nothing."""
    trial, parent = history.trials[exploit.trial], history.trials[exploit.parent]
    source = sweep.folder / seed_names(parent.number, 1, len(parent.lineage))[0] / "checkpoints"
    target = sweep.folder / seed_names(trial.number, 1, len(trial.lineage) + 1)[0] / "checkpoints"
    newest = max(source.glob("step-*"))
    if (target / newest.name).exists():
        return
    staging = target / f".taking-{newest.name}"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(newest, staging, copy_function=os.link)
    os.replace(staging, target / newest.name)
    (target / "latest").write_text(newest.name + "\n", encoding="utf-8")


def _job(sweep: Sweep, experiment: Experiment, claim: Claim) -> dict[str, Any]:
    return {
        "config": experiment.config.model_copy(update={"device": sweep.device}).model_dump(mode="json"),
        "run_dir": str(experiment.run_dir),
        "cache_dir": str(cache_dir(sweep.runs_dir)),
        "generation": claim.generation,
        "threads": sweep.settings.cpus_per_trial,
        "tracking": {"mlflow_run_id": experiment.identity["mlflow_run_id"]},
        "memory_limit": sweep.memory_limit,
        "workers": experiment.config.workers,
        "share": sweep.share,
        "vocab_size": None if sweep.footprints is None else sweep.footprints.vocab_size,
    }


def told(ending: Ending, seeds: int) -> dict[str, float]:
    """What the searcher heard of the point, and this seed's share of the cost."""
    values = {f"sweep/objective{f'_{index}' if index else ''}": value for index, value in enumerate(ending.values)}
    return {**values, "sweep/train_s": ending.train_s / seeds}
