"""Laws of faults in a sweep: whatever is killed or interrupted, every planned trial is there once, with the same bits.

One case of each here, chained since every process costs seconds; `make chaos` plays each ten times at other places.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.sweeps.journal import JOURNAL, read_history
from orchestrator.sweeps.searchers import RandomSearcher
from search_spaces.grammar import parse_assignment
from search_spaces.space import Space
from tests.cluster.head import Head
from tests.orchestrator.faults import PROJECT, alive, newest_step, read, seconds_until_gone
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

BAD_AND_GOOD = ["--set-space", "optim.lr=[1e-2,1e-9]", "--searcher", "grid", "--scheduler", "asha"]
BAD_AND_GOOD += ["--reduction", "2", "--evaluations", "20"]


@pytest.mark.slow
def test_a_stopped_trial_gives_its_cpu_back_without_a_dashboard(sweeps: SweepPlace) -> None:
    """On the cluster that the command starts for itself, which has no dashboard."""
    command = sweeps.start_sweep("stopped-early", *BAD_AND_GOOD, "budget.steps=16000")
    command.wait_until(lambda: newest_step(command.run_dir / "t0001") > 0, "training")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path.home() / ".orchestrate" / "ray_token")}
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    cpus = len(os.sched_getaffinity(0))
    if cpus < 2:
        pytest.skip("two trials at a time need two CPUs")
    see_what_it_gives_back(sweeps, command, cluster_address(command), plain | token, cpus)


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
        name = f"stopped-{workers}-{dashboard}"
        arguments = [*BAD_AND_GOOD, "--workers", str(workers), f"budget.steps={16000 // workers}"]
        given = {key: environment[key] for key in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        command = sweeps.start_sweep(name, *arguments, **given)
        command.wait_until(lambda: newest_step(command.run_dir / "t0001") > 0, "training")
        see_what_it_gives_back(sweeps, command, head.gcs_address, environment, 2 * workers, head.process.pid)
    finally:
        head.close()


def see_what_it_gives_back(
    sweeps: SweepPlace,
    command: Sweeping,
    address: str,
    environment: dict[str, str],
    cpus: int,
    below: int | None = None,
) -> None:
    """Ten seconds after the bad trial was stopped half of the cluster is free, and only the good one has processes and
    placement groups; once the sweep is over nothing is left."""
    watcher = Watcher(address, sweeps.runs.parent / f"{command.run_dir.name}-watch.log", environment)
    try:
        command.wait_until(lambda: len(watcher.looks()) > 0, "the watcher")
        command.wait_for_ends(1)
        ended = time.time()
        [stopped] = list(command.history.ended())
        assert stopped.ending is not None and stopped.ending.reason == "asha"
        assert stopped.params["optim.lr"] == 1e-9
        command.wait_until(lambda: time.time() > ended + FREE_S, "ten seconds")
        look = watcher.looks()[-1]
        assert look["cpus"] >= cpus / 2, f"not free after {FREE_S:g} s: {watcher.looks()}"
        assert look["groups"] <= max(1, max(each["groups"] for each in watcher.looks()) - 1)
        at_work = training_processes(command, below)
        assert len(at_work) <= cpus // 2, at_work
        assert not any(has_folder(each, command.run_dir / stopped.name) for each in at_work)
        command.expect(0)
        assert_sweep_told(sweeps.runs, command.run_dir.name)
        if below is not None:  # the cluster stays
            deadline = time.time() + FREE_S
            while watcher.looks()[-1]["cpus"] < cpus and time.time() < deadline:
                time.sleep(0.2)
            assert watcher.looks()[-1]["cpus"] == cpus and watcher.looks()[-1]["groups"] == 0
            assert not training_processes(command, below)
    finally:
        watcher.close()
    if below is None:
        seconds_until_gone(command.family)


def training_processes(command: Sweeping, below: int | None) -> list[psutil.Process]:
    """Of trials and their workers, on a cluster of the command's own or below the process of another."""
    if below is None:
        return command.trainers()
    every = alive(set(psutil.Process(below).children(recursive=True)))
    return [each for each in every if any(w in " ".join(each.cmdline()) for w in ("TrialActor", "TrainWorker"))]


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
