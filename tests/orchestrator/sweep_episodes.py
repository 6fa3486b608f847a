"""Real `orchestrate tune` processes that are watched, stopped and killed, with the laws of what they leave behind.

A test plays each episode once, `make chaos` many times. An AssertionError is a law broken.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.sweeps.history import History, seed_names
from orchestrator.sweeps.journal import JOURNAL, read_history
from tests.orchestrator.faults import (
    PROJECT,
    Command,
    Place,
    Tracked,
    expected_history,
    has_open,
    left,
    newest_step,
    read,
    runs_named,
    seconds_until_gone,
    title,
    tracked,
)
from tests.trainers.crash import merged
from trainers.record import read_rows

Measured = dict[str, float | int | str]

TRIALS, STEPS = 4, 800
OF_THE_SWEEP = ("sweep/", "by_tokens/", "mem/predicted_gib")
"""what a sweep logs of a trial beside the trial's own record"""
CONFIG = """
model: {{d_model: 16, n_layers: 1, n_heads: 2, context_length: 32, dropout: 0.1}}
data: {{sources: [{{corpus: {text}}}]}}
batch: {{sequences: 8}}
budget: {{steps: {steps}}}
optim: {{lr: 3.0e-3}}
schedule: {{kind: constant, warmup_steps: 5}}
evaluation: {{max_tokens: 1024}}
logging: {{every_steps: 20}}
"""
SPACE = ["--set-space", "optim.lr=log(1e-3,3e-2)", "--set-space", "batch.sequences=[4,8]"]
RANDOM = [*SPACE, "--searcher", "random", "--scheduler", "none", "--trials", str(TRIALS), "--evaluations", "6"]


class SweepPlace(Place):
    """A runs folder with a small text, and a configuration whose trials take some seconds."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.config.write_text(CONFIG.format(text=self.text, steps=STEPS))

    def start_sweep(self, name: str, *arguments: str, target: str | Path | None = None, **environment: str) -> Sweeping:
        """`orchestrate tune` of this place's configuration under `name`, as a process of its own."""
        typed = ["tune", str(target or self.config), "--name", name, "--runs-dir", str(self.runs), *arguments]
        log = self.runs.parent / f"{name}-{len(self.commands)}.log"
        command = Sweeping(typed, self.runs / name, log, environment)
        self.commands.append(command)
        return command

    def run_sweep(self, name: str, *arguments: str, expect: int = 0, **more: Any) -> Sweeping:
        """The same, waited for."""
        command = self.start_sweep(name, *arguments, **more)
        command.expect(expect)
        return command


class Sweeping(Command):
    """One `orchestrate tune` process with its trials."""

    @property
    def history(self) -> History:
        return read_history(self.run_dir / JOURNAL)

    def actor_of(self, name: str) -> psutil.Process | None:
        """The process that trains a trial: it has the record open."""
        record = self.run_dir / name / "metrics.jsonl"
        return next((each for each in self.look_around() if has_open(each, record)), None)

    def trainers(self) -> list[psutil.Process]:
        """The processes of trials, at work or kept for the next."""
        return trainers_among(self.look_around())

    def wait_for_trial(self, name: str, step: int) -> None:
        """Until a trial's record has come so far."""
        self.wait_until(lambda: newest_step(self.run_dir / name) >= step, f"step {step} of {name}")

    def wait_for_ends(self, count: int) -> None:
        """Until so many trials have ended."""
        self.wait_until(lambda: sum(1 for _ in self.history.ended()) >= count, f"the end of {count} trials")

    def kill_trial(self, name: str, step: int) -> int:
        """SIGKILL to the process that trains `name` once it has come to `step`; the step where it stood."""
        self.wait_for_trial(name, step)
        victim = self.actor_of(name)
        assert victim is not None, f"nobody trains {name}"
        victim.kill()
        return newest_step(self.run_dir / name)


def trainers_among(processes: set[psutil.Process]) -> list[psutil.Process]:
    """The processes of trials and of their workers."""
    return [each for each in processes if any(word in title(each) for word in ("TrialActor", "TrainWorker"))]


# ---- what a sweep leaves behind ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepLeft:
    """Everything that must be the same whatever befell a sweep."""

    trials: dict[int, dict[str, Any]]
    """number -> settings, configuration, evaluations, ending and every row of its record"""
    best: str
    digest: str | None
    """of the best trial's last checkpoint"""


def left_by(folder: Path) -> SweepLeft:
    history = read_history(folder / JOURNAL)
    trials, best = {}, ("", math.inf)
    for number, trial in sorted(history.trials.items()):
        assert trial.ending is not None, f"{trial.name} has not ended"
        trials[number] = {
            "params": trial.params,
            "config": (folder / trial.name / "config.yaml").read_text(),
            "seen": [repr(seen) for seen in trial.seen],
            "ending": (trial.ending.reason, repr(trial.ending.values), trial.ending.tokens),
            "rows": merged(left(folder / trial.name).rows),
        }
        best = min(best, (trial.name, trial.ending.values[0]), key=lambda each: each[1])
    return SweepLeft(trials, best[0], left(folder / best[0]).digest)


def assert_same_sweep(folder: Path, whole: SweepLeft) -> None:
    """The same settings, configurations, metrics and final losses, bit for bit; the same best checkpoint."""
    found = left_by(folder)
    assert found.trials.keys() == whole.trials.keys()
    for number, trial in whole.trials.items():
        for part, value in trial.items():
            assert found.trials[number][part] == value, f"trial {number}: another {part}"
    assert (found.best, found.digest) == (whole.best, whole.digest)


def assert_journal_whole(folder: Path, trials: int) -> None:
    """Each planned trial asked for once and ended once, and each evaluation noted once, in the order of tokens."""
    events = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    for kind in ("asked", "ended"):
        assert Counter(e["trial"] for e in events if e["event"] == kind) == Counter(range(trials)), kind
    for number in range(trials):
        tokens = [e["tokens"] for e in events if (e["event"], e["trial"]) == ("seen", number)]
        assert tokens == sorted(set(tokens))


def assert_sweep_told(runs: Path, name: str, status: str = "FINISHED", reason: str = "completed") -> list[Tracked]:
    """MLflow has one parent and one child for each training, ended truthfully; each value of each record once; what
    the searcher was told as the journal has it."""
    folder = runs / name
    history, identity = read_history(folder / JOURNAL), read(folder, "sweep.json")
    assert runs_named(runs, name) == [identity["mlflow_run_id"]]
    parent = tracked(runs, identity["mlflow_run_id"])
    assert (parent.status, parent.tags["stop_reason"], parent.tags["kind"]) == (status, reason, "sweep")
    children = children_of(runs, parent.run_id)
    seeds = identity["settings"]["seeds"]
    expected = {
        f"{name}/{folder_name}": trial
        for trial in history.trials.values()
        for folder_name in seed_names(trial.number, seeds, len(trial.lineage))
        if (folder / folder_name / "identity.json").exists()
    }
    assert sorted(children) == sorted(expected)
    for child_name, trial in expected.items():
        [run_id] = children[child_name]
        run_dir = runs / child_name
        assert read(run_dir, "identity.json")["mlflow_run_id"] == run_id
        told = tracked(runs, run_id)
        assert told.status != "RUNNING", f"{child_name} is an orphan"
        assert told.tags["trial.point"] == str(trial.number)
        wrong = {key: values for key, values in told.history.items() if len(values) != 1}
        assert not wrong, f"{child_name}: not exactly once: {Counter(metric for _, metric in wrong)}"
        own = {key: v for key, v in told.history.items() if not key[1].startswith(OF_THE_SWEEP)}
        assert own == expected_history(run_dir), child_name
        assert by_tokens(told) == expected_by_tokens(run_dir), child_name
        assert_told_as_the_journal(told, trial)
    return [tracked(runs, run_id) for [run_id] in children.values()]


def assert_told_as_the_journal(told: Tracked, trial: Any) -> None:
    objectives = {key: v for key, v in told.history.items() if key[1].startswith("sweep/objective")}
    if trial.ending is None:
        assert not objectives
        assert told.tags["stop_reason"] in ("user", "budget")
        return
    assert [values for _, values in sorted(objectives.items())] == [[value] for value in trial.ending.values]
    assert told.tags["stop_reason"] == trial.ending.reason
    ends = {"completed": "FINISHED", "nonfinite": "FAILED", "oom": "FAILED", "error": "FAILED"}
    assert told.status == ends.get(trial.ending.reason, "KILLED")


def by_tokens(told: Tracked) -> dict[tuple[int, str], list[float]]:
    return {key: values for key, values in told.history.items() if key[1].startswith("by_tokens/")}


def expected_by_tokens(run_dir: Path) -> dict[tuple[int, str], list[float]]:
    return {
        (row["tokens"], f"by_tokens/{name}"): [value]
        for row, _ in read_rows(run_dir / "metrics.jsonl")
        for name, value in row.items()
        if name.startswith("val/")
    }


def children_of(runs: Path, parent_run_id: str) -> dict[str, list[str]]:
    """Name -> ids of every run nested directly below this one."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found: dict[str, list[str]] = {}
    for run in client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent_run_id}'"):
        found.setdefault(run.info.run_name, []).append(run.info.run_id)
    return found


def nobody_runs(runs: Path) -> bool:
    """Whether no run of the store says that it is at work."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return not client.search_runs(experiments, "attributes.status = 'RUNNING'")


# ---- episodes ------------------------------------------------------------------------------------------------------


def undisturbed_sweep(place: SweepPlace, name: str = "undisturbed", arguments: list[str] = RANDOM) -> SweepLeft:
    """What a sweep leaves behind to which nothing happens."""
    command = place.run_sweep(name, *arguments)
    trials = len(command.history.trials)
    assert_journal_whole(command.run_dir, trials)
    assert_sweep_told(place.runs, name)
    assert nobody_runs(place.runs) and "Traceback" not in command.output
    seconds_until_gone(command.family)
    return left_by(command.run_dir)


def assert_as_undisturbed(place: SweepPlace, command: Sweeping, whole: SweepLeft) -> None:
    assert_journal_whole(command.run_dir, len(whole.trials))
    assert_same_sweep(command.run_dir, whole)
    assert_sweep_told(place.runs, command.run_dir.name)
    assert nobody_runs(place.runs)
    seconds_until_gone(command.family)


def interrupt_sweep(place: SweepPlace, name: str, arguments: list[str], trial: str, step: int) -> Measured:
    """Ctrl-C once a trial has come to `step`: everything stops in order and can go on."""
    command = place.start_sweep(name, *arguments)
    command.wait_for_trial(trial, step)
    command.look_around()
    return interrupt(place, command)


def interrupt(place: SweepPlace, command: Sweeping) -> Measured:
    asked = time.monotonic()
    command.interrupt()
    command.expect(75)
    ended_s = time.monotonic() - asked
    orphans_s = seconds_until_gone(command.family)
    assert "Traceback" not in command.output, command.output
    assert_sweep_told(place.runs, command.run_dir.name, "KILLED", "user")
    assert nobody_runs(place.runs)
    return {"signal_to_exit_s": round(ended_s, 2), "last_orphan_after_s": orphans_s}


def kill_sweep_driver(place: SweepPlace, name: str, arguments: list[str], trial: str, step: int) -> Measured:
    """SIGKILL to the driver once a trial has come to `step`; whatever it started ends by itself."""
    command = place.start_sweep(name, *arguments)
    command.wait_for_trial(trial, step)
    command.kill_driver()
    return {"last_orphan_after_s": seconds_until_gone(command.family)}


def kill_sweep_trial(
    place: SweepPlace, name: str, arguments: list[str], trial: str, step: int
) -> tuple[Sweeping, Measured]:
    """SIGKILL to the process of a trial at `step`; the trial is retried from its checkpoint, by the same driver."""
    command = place.start_sweep(name, *arguments)
    at = command.kill_trial(trial, step)
    died = time.monotonic()
    command.wait_until(
        lambda: newest_step(command.run_dir / trial) > at or bool(left(command.run_dir / trial).state),
        f"{trial} beyond step {at}",
    )
    return command, {"step": at, "kill_to_new_step_s": round(time.monotonic() - died, 2)}


def any_moment(rng: random.Random, whole: SweepLeft) -> tuple[str, int]:
    """A trial and a step of it at which something may happen."""
    number = rng.randrange(len(whole.trials))
    last = max(step for step, _ in whole.trials[number]["rows"])
    return f"t{number:04d}", rng.randrange(1, int(last * 0.8))


# ---- resources -----------------------------------------------------------------------------------------------------

WATCH = """
import json, sys, time, ray
from ray.util import placement_group_table
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
while True:
    free = ray.available_resources().get("CPU", 0.0)
    groups = sum(1 for group in placement_group_table().values() if group["state"] != "REMOVED")
    print(json.dumps({"at": time.time(), "cpus": free, "groups": groups}), flush=True)
    time.sleep(0.25)
"""


class Watcher:
    """Another driver of the same cluster, which notes what is free and which placement groups there are."""

    def __init__(self, address: str, log: Path, environment: dict[str, str]):
        self.log = log
        self._output = log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", WATCH, address], stdout=self._output, stderr=subprocess.STDOUT, cwd=PROJECT,
            env=environment,
        )  # fmt: skip

    def looks(self) -> list[dict[str, float]]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._output.close()


def cluster_address(command: Command) -> str:
    """Of the Ray that a command started by itself."""
    for process in command.look_around():
        for word in title(process).split():
            if word.startswith("--gcs-address="):
                return word.partition("=")[2]
    raise AssertionError("no raylet below this command")
