"""Laws of faults in a sweep: whatever is killed or interrupted, every planned trial is there once, with the same bits.

One case of each here, chained since every process costs seconds; `make chaos` plays each ten times at other places.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from orchestrator.sweeps.journal import JOURNAL, read_history
from orchestrator.sweeps.searchers import RandomSearcher
from search_spaces.grammar import parse_assignment
from search_spaces.space import Space
from tests.cluster.head import BIN, Head
from tests.orchestrator.faults import PROJECT, alive, read, seconds_until_gone
from tests.orchestrator.store_server import Server
from tests.orchestrator.sweep_episodes import (
    RANDOM,
    SPACE,
    STEPS,
    Sweeping,
    SweepLeft,
    SweepPlace,
    Watcher,
    assert_as_undisturbed,
    assert_journal_whole,
    assert_same_sweep,
    assert_sweep_told,
    cluster_address,
    interrupt,
    kill_sweep_driver,
    kill_sweep_trial,
    left_by,
    nobody_runs,
    trainers_among,
    undisturbed_sweep,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
FREE_S = 10.0  # from the stop of a trial until its share is free and its processes are gone
TPE = [*SPACE, "--searcher", "tpe", "--scheduler", "none", "--trials", "6", "--concurrent", "1"]
TPE += ["--evaluations", "2", "budget.steps=200"]


# ---- kills and stops -------------------------------------------------------------------------------------------------


def test_kills_and_a_stop_are_invisible(sweeps: SweepPlace, whole_sweep: SweepLeft) -> None:
    """Kill -9 of a trial, then Ctrl-C, then the same command, kill -9 of the driver, and the same command."""
    command, _ = kill_sweep_trial(sweeps, "disturbed", RANDOM, "t0000", STEPS // 3)
    interrupt(sweeps, command)
    before = {trial.number for trial in command.history.ended()}
    kill_sweep_driver(sweeps, "disturbed", RANDOM, "t0002", STEPS // 3)
    assert len(list(command.history.ended())) >= len(before)
    again = sweeps.run_sweep("disturbed", *RANDOM)
    assert_as_undisturbed(sweeps, again, whole_sweep)
    notes = (again.run_dir / "t0000" / "logs" / "events.jsonl").read_text()
    assert "its process died" in notes and "Traceback" not in again.output


@pytest.mark.slow
def test_a_driver_killed_while_trials_end_owes_mlflow_nothing(sweeps: SweepPlace, whole_sweep: SweepLeft) -> None:
    """As soon as the journal has the end of a trial, which MLflow has not: the next command tells it."""
    command = sweeps.start_sweep("owing", *RANDOM)
    command.wait_for_ends(1)
    command.kill_driver()
    ended = [trial.name for trial in command.history.ended()]
    assert ended
    seconds_until_gone(command.family)
    again = sweeps.run_sweep("owing", *RANDOM)
    assert_as_undisturbed(sweeps, again, whole_sweep)


def test_another_seed_is_another_sweep(whole_sweep: SweepLeft) -> None:
    """Negative control of the two above."""
    space = Space(tuple(parse_assignment(text) for text in SPACE[1::2]))
    history = read_history(Path("nowhere"))
    assert RandomSearcher(space, 0).ask(history) == whole_sweep.trials[0]["params"]
    assert RandomSearcher(space, 1).ask(history) != whole_sweep.trials[0]["params"]
    assert len({json.dumps(sorted(map(str, trial["rows"].items()))) for trial in whole_sweep.trials.values()}) == len(whole_sweep.trials)  # fmt: skip # noqa: E501


@pytest.mark.slow
def test_tpe_one_at_a_time_remembers_over_a_kill(sweeps: SweepPlace) -> None:
    reference = undisturbed_sweep(sweeps, "tpe", TPE)
    assert len({json.dumps(trial["params"]) for trial in reference.trials.values()}) == 6
    command = sweeps.start_sweep("tpe-killed", *TPE)
    command.wait_for_ends(3)
    command.kill_driver()
    seconds_until_gone(command.family)
    again = sweeps.run_sweep("tpe-killed", *TPE)
    assert_as_undisturbed(sweeps, again, reference)


@pytest.mark.slow
def test_tpe_with_asha_in_parallel_is_told_what_the_store_has(sweeps: SweepPlace) -> None:
    """Cut twice; and every completed loss is what its configuration gives alone."""
    arguments = [*SPACE, "--searcher", "tpe", "--scheduler", "asha", "--trials", "8", "budget.steps=400"]
    command = sweeps.start_sweep("asha-killed", *arguments)
    command.wait_for_ends(2)
    command.kill_driver()
    seconds_until_gone(command.family)
    command = sweeps.start_sweep("asha-killed", *arguments)
    command.wait_for_ends(4)
    interrupt(sweeps, command)
    again = sweeps.run_sweep("asha-killed", *arguments)
    assert_journal_whole(again.run_dir, 8)
    assert_sweep_told(sweeps.runs, "asha-killed")
    completed = [trial for trial in again.history.ended() if trial.ending and trial.ending.reason == "completed"]
    assert completed
    for trial in completed:
        config = str(again.run_dir / trial.name / "config.yaml")
        alone = sweeps.run(f"alone-{trial.name}", target=config, OMP_NUM_THREADS="1").expect(0)
        assert trial.ending is not None
        assert read(alone.run_dir, "outcome.json")["metrics"]["val/loss"] == trial.ending.values[0]


@pytest.mark.slow
def test_several_seeds_survive_kills(sweeps: SweepPlace) -> None:
    arguments = [*SPACE, "--searcher", "random", "--scheduler", "asha", "--trials", "2", "--seeds", "2"]
    arguments += ["--concurrent", "1", "budget.steps=600"]
    reference = sweeps.run_sweep("seeds", *arguments)
    assert_sweep_told(sweeps.runs, "seeds")
    command = sweeps.start_sweep("seeds-killed", *arguments)
    command.kill_trial("t0000-s1", 150)
    command.wait_for_trial("t0000-s0", 300)
    command.kill_driver()
    seconds_until_gone(command.family)
    again = sweeps.run_sweep("seeds-killed", *arguments)
    assert_journal_whole(again.run_dir, 2)
    assert_sweep_told(sweeps.runs, "seeds-killed")
    theirs, ours = reference.history.trials, again.history.trials
    assert [t.seen for t in ours.values()] == [t.seen for t in theirs.values()]
    assert [t.params for t in ours.values()] == [t.params for t in theirs.values()]


@pytest.mark.slow
def test_a_store_that_is_away_between_two_trials_is_waited_for(server: Server, tmp_path: Path) -> None:
    """Tune has nothing at work meanwhile, and asks on; in test_sweep_driver.py without Tune, with the control."""
    place = SweepPlace(tmp_path)
    place.runs.mkdir()
    (place.runs / "mlflow.db").symlink_to(tmp_path / "mlflow.db")  # where the laws look: the server's own
    given = {"MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"]}
    arguments = [*RANDOM, "--trials", "2", "--concurrent", "1"]
    try:
        command = place.start_sweep("away", *arguments, **given)
        command.wait_for_trial("t0000", STEPS // 2)
        server.failing = True
        command.wait_until(lambda: "the next one begins when it is back" in command.output, "the sentence")
        began = time.time()
        command.wait_until(lambda: time.time() > began + 3, "three seconds")
        server.failing = False
        command.expect(0)
        assert "trials begin again" in command.output and "Traceback" not in command.output
        assert_journal_whole(command.run_dir, 2)
        assert_sweep_told(place.runs, "away")
    finally:
        place.close()


# ---- what a stopped trial gives back ---------------------------------------------------------------------------------

EVALUATIONS, LONG = 20, 12000
GOOD_AND_BAD = ["--set-space", "optim.lr=[1e-2,1e-9]", "--searcher", "grid", "--scheduler", "asha"]
GOOD_AND_BAD += ["--reduction", "2", "--evaluations", str(EVALUATIONS)]


@dataclass(frozen=True)
class Cluster:
    """Where a sweep trains, as its processes and another driver see it."""

    address: str
    environment: dict[str, str]
    cpus: int
    root: psutil.Process | None = None
    """above all of its processes, where it was there before the sweep; None: it is the sweep's own"""

    def training(self, command: Sweeping) -> list[psutil.Process]:
        """The processes of trials and of their workers."""
        if self.root is None:
            return command.trainers()
        return trainers_among(alive(set(self.root.children(recursive=True))))


@pytest.mark.slow
def test_a_stopped_trial_gives_everything_back_without_a_dashboard(sweeps: SweepPlace) -> None:
    """On the cluster that the command starts for itself, which has no dashboard."""
    cpus = len(os.sched_getaffinity(0))
    if cpus < 2:
        pytest.skip("two trials at a time need two CPUs")
    command = sweeps.start_sweep("stopped-early", *GOOD_AND_BAD, f"budget.steps={LONG}")
    wait_for_both(command)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path.home() / ".orchestrate" / "ray_token")}
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    cluster = Cluster(cluster_address(command), plain | token, cpus)
    with watched(sweeps, command, cluster) as watcher:
        see_what_it_gives_back(sweeps, command, LONG, cluster, watcher)
    seconds_until_gone(command.family)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "dashboard"), [(1, True), (2, False), (2, True)])
def test_a_stopped_trial_gives_everything_back_on_a_cluster(
    workers: int, dashboard: bool, sweeps: SweepPlace, tmp_path: Path
) -> None:
    """On one that was there before, with Ray Train inside the trial for two workers."""
    head = Head(tmp_path, cpus=2 * workers, dashboard=dashboard)
    try:
        head.wait_until_up()
        environment = head.environment(RAY_ADDRESS=head.gcs_address)
        name, steps = f"stopped-{workers}-{dashboard}", LONG // workers
        arguments = [*GOOD_AND_BAD, "--workers", str(workers), f"budget.steps={steps}"]
        given = {key: environment[key] for key in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        command = sweeps.start_sweep(name, *arguments, **given)
        wait_for_both(command)
        cluster = Cluster(head.gcs_address, environment, 2 * workers, psutil.Process(head.process.pid))
        with watched(sweeps, command, cluster) as watcher:
            see_what_it_gives_back(sweeps, command, steps, cluster, watcher)
            deadline = time.time() + FREE_S
            while watcher.looks()[-1]["cpus"] < cluster.cpus and time.time() < deadline:
                time.sleep(0.2)
            assert watcher.looks()[-1]["cpus"] == cluster.cpus and watcher.looks()[-1]["groups"] == 0
            assert not cluster.training(command)
    finally:
        head.close()


def wait_for_both(command: Sweeping) -> None:
    for trial in ("t0000", "t0001"):
        command.wait_for_trial(trial, 1)


@contextmanager
def watched(sweeps: SweepPlace, command: Sweeping, cluster: Cluster) -> Iterator[Watcher]:
    log = sweeps.runs.parent / f"{command.run_dir.name}-watch.log"
    watcher = Watcher(cluster.address, log, cluster.environment)
    try:
        yield watcher
    finally:
        watcher.close()


def see_what_it_gives_back(
    sweeps: SweepPlace, command: Sweeping, steps: int, cluster: Cluster, watcher: Watcher
) -> None:
    """Ten seconds after the bad trial was stopped half of the cluster is free, and the good one alone has processes,
    memory and placement groups."""
    held = cluster.training(command)
    bytes_held = resident_bytes(held)
    let_the_good_one_go_first(command, held, steps // EVALUATIONS + 1)
    command.wait_until(lambda: len(watcher.looks()) > 0, "the watcher")
    command.wait_for_ends(1)
    ended = time.time()
    [stopped] = list(command.history.ended())
    assert stopped.ending is not None and stopped.ending.reason == "asha"
    assert stopped.params["optim.lr"] == 1e-9
    command.wait_until(lambda: time.time() > ended + FREE_S, "ten seconds")
    look = watcher.looks()[-1]
    assert look["cpus"] >= cluster.cpus / 2, f"not free after {FREE_S:g} s: {look}\n{stacks(alive(set(held)))}"
    assert look["groups"] == max(each["groups"] for each in watcher.looks()) / 2 > 0
    at_work = cluster.training(command)
    assert len(at_work) == len(held) / 2, (held, at_work)
    assert resident_bytes(at_work) < 0.6 * bytes_held
    assert not any(has_folder(each, command.run_dir / stopped.name) for each in at_work)
    assert any(has_folder(each, command.run_dir / "t0000") for each in at_work)
    command.expect(0)
    assert_sweep_told(sweeps.runs, command.run_dir.name)


def let_the_good_one_go_first(command: Sweeping, training: list[psutil.Process], step: int) -> None:
    """Halt the bad one until the good one is at `step`: the first at a rung has nobody to be worse than."""
    bad = [each for each in training if has_folder(each, command.run_dir / "t0001")]
    assert bad
    for each in bad:
        each.suspend()
    try:
        command.wait_for_trial("t0000", step)
    finally:
        for each in bad:
            each.resume()


def stacks(processes: set[psutil.Process]) -> str:
    """Where each of them stands, as py-spy sees it."""
    spy = shutil.which("py-spy", path=BIN)
    dumps = [[spy, "dump", "--pid", str(each.pid)] for each in processes if spy]
    return "\n".join(subprocess.run(dump, capture_output=True, text=True, check=False).stdout for dump in dumps)


def resident_bytes(processes: list[psutil.Process]) -> int:
    return sum(each.memory_info().rss for each in processes)


def has_folder(process: psutil.Process, folder: Path) -> bool:
    return any(opened.path.startswith(str(folder)) for opened in process.open_files())


# ---- the same law on other machines ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_does_not_depend_on_how_many_train_at_a_time(sweeps: SweepPlace, whole_sweep: SweepLeft) -> None:
    command = sweeps.run_sweep("one-by-one", *RANDOM, "--concurrent", "1")
    assert_same_sweep(command.run_dir, whole_sweep)
    assert left_by(command.run_dir).best == whole_sweep.best
    assert nobody_runs(sweeps.runs) and (PROJECT / "orchestrator").is_dir()
    assert (command.run_dir / JOURNAL).exists()
