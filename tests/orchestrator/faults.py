"""Real `orchestrate train` processes that are watched, signalled and killed, and what they leave behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tests.trainers.crash import Ending, ending, merged
from trainers.claim import Holder
from trainers.record import HEAD, read_rows

if TYPE_CHECKING:
    from orchestrator.tracking import TrackedRun

PROJECT = Path(__file__).parents[2]
STEPS = 240
SAVE_EVERY = 20
PATIENCE_S = 150.0  # with anything that should happen, on a machine that others use too
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "two",
    "dogs",
    "run",
    "to",
    "an",
    "old",
    "tree",
    "of",
    "rain",
)

CONFIG = """
model: {{d_model: 48, n_layers: 1, n_heads: 2, context_length: 32, dropout: 0.1}}
data: {{sources: [{{corpus: {text}}}]}}
batch: {{sequences: 8, micro_sequences: 4}}
budget: {{steps: {steps}}}
optim: {{lr: 3.0e-3}}
schedule: {{kind: constant, warmup_steps: 5}}
evaluation: {{every_steps: 40, every_epochs: null, max_tokens: 1024}}
checkpoint: {{every_steps: {save_every}, keep_last_n: 2}}
logging: {{every_steps: 1}}
samples: {{count: 1, prompt_tokens: 4, new_tokens: 8}}
"""


class Place:
    """A runs folder with a small text and a configuration of `STEPS` updates of some milliseconds."""

    def __init__(self, folder: Path):
        self.runs = folder / "runs"
        self.text = folder / "small.txt"
        self.config = folder / "small.yaml"
        self.commands: list[Command] = []
        rng = random.Random(0)
        self.text.write_text(" ".join(rng.choice(WORDS) for _ in range(8000)))
        self.config.write_text(CONFIG.format(text=self.text, steps=STEPS, save_every=SAVE_EVERY))

    def start(self, name: str, *arguments: str, target: str | Path | None = None, **environment: str) -> Command:
        """`orchestrate train` of this place's configuration (or of `target`) under `name`, as a process of its own."""
        naming = [] if target == name else ["--name", name]
        typed = ["train", str(target or self.config), *naming, "--runs-dir", str(self.runs), *arguments]
        command = Command(typed, self.runs / name, self.runs.parent / f"{name}-{len(self.commands)}.log", environment)
        self.commands.append(command)
        return command

    def run(self, name: str, *arguments: str, target: str | Path | None = None, **environment: str) -> Command:
        """The same, waited for."""
        command = self.start(name, *arguments, target=target, **environment)
        command.wait()
        return command

    def discard(self, name: str) -> None:
        shutil.rmtree(self.runs / name, ignore_errors=True)

    def close(self) -> None:
        """Leave no process behind, whatever went wrong."""
        for command in self.commands:
            command.kill_all()


class Command:
    """One `orchestrate` process, with all that it starts."""

    def __init__(self, arguments: list[str], run_dir: Path, log: Path, environment: dict[str, str]):
        self.run_dir = run_dir
        self.log = log
        surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
        self.started = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=PROJECT,
                env=surroundings | {"COLUMNS": "120"} | environment,
                start_new_session=True,  # a terminal's Ctrl-C reaches a process group: `interrupt` sends it to this one
            )
        self.family: set[psutil.Process] = set()
        """every process seen below this command"""

    # ---- looking --------------------------------------------------------------------------------

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def exitcode(self) -> int | None:
        return self.process.poll()

    def look_around(self) -> set[psutil.Process]:
        """Remember the processes below this command; those that live now."""
        with suppress(psutil.NoSuchProcess):
            self.family |= set(psutil.Process(self.pid).children(recursive=True))
        return alive(self.family)

    def workers(self) -> list[psutil.Process]:
        """The training workers, rank 0 first: it is the one that has the record open."""
        found = [process for process in self.look_around() if "TrainWorker" in title(process)]
        return sorted(found, key=lambda worker: not has_open(worker, self.run_dir / "metrics.jsonl"))

    def wait_for_step(self, step: int) -> None:
        """Until the record has a row of `step` or a later one."""
        self.wait_until(lambda: newest_step(self.run_dir) >= step, f"step {step}")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.exitcode is None, f"ended with {self.exitcode} before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S} s:\n{self.output}"
            time.sleep(0.002)

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """The exit code."""
        try:
            return self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still at work after {patience_s} s:\n{self.output}") from None

    def expect(self, exitcode: int, patience_s: float = PATIENCE_S) -> Command:
        """Wait for the end, which must be this one."""
        assert self.wait(patience_s) == exitcode, f"exit code {self.exitcode}, not {exitcode}:\n{self.output}"
        return self

    # ---- acting ---------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Ctrl-C in a terminal: every process of the group gets it."""
        os.killpg(self.pid, signal.SIGINT)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill_driver(self) -> None:
        """SIGKILL to this process alone: what it started finds out by itself."""
        self.look_around()
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        self.look_around()
        with suppress(ProcessLookupError):
            self.process.kill()
        for process in self.family:  # psutil knows a process by its start time too: no stranger with a reused id
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def has_open(process: psutil.Process, path: Path) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any(opened.path == str(path) for opened in process.open_files())
    return False


def alive(processes: set[psutil.Process]) -> set[psutil.Process]:
    """Those that run; a zombie does not."""
    running = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                running.add(process)
    return running


def seconds_until_gone(processes: set[psutil.Process], at_most: float = 30.0) -> float:
    """How long they took to end; AssertionError where some are left after `at_most`."""
    started = time.monotonic()
    while left := alive(processes):
        assert time.monotonic() - started < at_most, f"orphans after {at_most:g} s: {left}"
        time.sleep(0.1)
    return round(time.monotonic() - started, 1)


# ---- the run's folder --------------------------------------------------------------------------------


def newest_step(run_dir: Path) -> int:
    """The step of the record's last complete line; -1 where there is none."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return -1
    return json.loads(lines[-1])["step"] if lines else -1


def read(run_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((run_dir / name).read_text())


def claim_of(run_dir: Path) -> Holder:
    return Holder(**read(run_dir, "claim"))


def checkpoint_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def left(run_dir: Path) -> Ending:
    """What the run's folder holds now."""
    return ending(run_dir, 0)


SNAPSHOTS = {
    "torn": '{"ray_version": "2.60.0", "checkpoint_results": [{"checkpoint_dir_name": "checkpo',
    "empty": "",
    "foreign": '{"ray_version": "9.9.9", "x": [1]}',
}
"""a checkpoint_manager_snapshot.json that plain Ray refuses to start from"""


def spoil_ray(run_dir: Path, how: str) -> list[Path]:
    """Damage every file that Ray keeps in the run's folder, and plant a snapshot in this claim's and the next one's.

    Ray itself writes none here, because no checkpoint is ever reported to it: what is not there cannot be torn.
    """
    ours, generation = run_dir / ".ray", claim_of(run_dir).generation
    files = [path for path in ours.rglob("*") if path.is_file()]
    files += [ours / f"claim-{number}" / "checkpoint_manager_snapshot.json" for number in (generation, generation + 1)]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SNAPSHOTS[how])
    return files


# ---- MLflow ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tracked:
    """One run as MLflow has it."""

    run_id: str
    status: str
    tags: dict[str, str]
    history: dict[tuple[int, str], list[float]] = field(repr=False)
    """(step, metric) -> its values: exactly one each, if all is well; the machine's own metrics left out"""


def history(run: TrackedRun, key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric as the store has it."""
    return [(m.step, m.value) for m in run.store.client.get_metric_history(run.run_id, key)]


def tracked(runs: Path, run_id: str) -> Tracked:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    run = client.get_run(run_id)
    history: dict[tuple[int, str], list[float]] = {}
    for key in run.data.metrics:
        for point in [] if key.startswith("system/") else client.get_metric_history(run_id, key):
            history.setdefault((point.step, key), []).append(point.value)
    return Tracked(run_id, run.info.status, run.data.tags, history)


def runs_named(runs: Path, name: str) -> list[str]:
    """The ids of every MLflow run of this name: a run must never get a second one."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.run_id for run in client.search_runs(experiments, f"attributes.run_name = '{name}'")]


def expected_history(run_dir: Path) -> dict[tuple[int, str], list[float]]:
    """What MLflow must have: each value of the record, once."""
    table: dict[tuple[int, str], list[float]] = {}
    for row, _ in read_rows(run_dir / "metrics.jsonl"):
        for name, value in row.items():
            if name not in HEAD:
                table[row["step"], name] = [value]
        table[row["step"], "tokens"] = [row["tokens"]]
    return table


def undisturbed(place: Place, name: str, workers: int) -> Ending:
    """What a run leaves behind to which nothing happens."""
    command = place.run(name, "--workers", str(workers)).expect(0)
    assert_told_once(place.runs, command.run_dir)
    return left(command.run_dir)


# ---- the laws ----------------------------------------------------------------------------------------


def assert_same(run_dir: Path, reference: Ending) -> None:
    """The same bits in the newest checkpoint, and the same metrics, each once and none missing."""
    found = left(run_dir)
    assert found.state == "finished"
    table = merged(found.rows)
    diverged = sorted(name for _, name in table if name.startswith("resume/"))
    assert not diverged, f"{len(diverged)} steps were not replayed exactly"
    assert table == merged(reference.rows)
    assert found.digest == reference.digest


def assert_told_once(runs: Path, run_dir: Path, status: str = "FINISHED") -> Tracked:
    """MLflow has one run of this name with each value of the record exactly once, and its true end."""
    run_id = read(run_dir, "identity.json")["mlflow_run_id"]
    assert runs_named(runs, run_dir.name) == [run_id]
    told = tracked(runs, run_id)
    wrong = {key: values for key, values in told.history.items() if len(values) != 1}
    assert not wrong, f"not exactly once: {Counter(name for _, name in wrong)}"
    assert told.history == expected_history(run_dir)
    assert told.status == status
    return told


@contextmanager
def database_locked(path: Path) -> Iterator[None]:
    """Nobody else can use the SQLite file meanwhile."""
    import sqlite3

    with sqlite3.connect(path, isolation_level=None, timeout=30) as other:
        other.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")
