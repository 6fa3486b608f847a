"""Laws of sweeps through real `orchestrate tune` processes: Ray Tune, MLflow, and what is left when all is over."""

from __future__ import annotations

import json
import math
import shlex

import pytest

from orchestrator.sweeps.history import PENALTY
from orchestrator.sweeps.journal import JOURNAL, read_history
from tests.orchestrator.faults import left, read, seconds_until_gone, tracked
from tests.orchestrator.sweep_episodes import (
    RANDOM,
    TRIALS,
    SweepLeft,
    SweepPlace,
    assert_journal_whole,
    assert_sweep_told,
    left_by,
    nobody_runs,
)
from trainers.checkpoint import CheckpointStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
SHORT = ["budget.steps=240"]


def test_a_sweep_ends_with_the_winner(sweeps: SweepPlace, whole_sweep: SweepLeft) -> None:
    """Every trial trained on equal tokens; MLflow, the folder and the screen agree on the best."""
    assert len(whole_sweep.trials) == TRIALS
    assert len({trial["ending"][2] for trial in whole_sweep.trials.values()}) == 1
    assert len({trial["ending"][1] for trial in whole_sweep.trials.values()}) == TRIALS
    folder = sweeps.runs / "undisturbed"
    parent = tracked(sweeps.runs, read(folder, "sweep.json")["mlflow_run_id"])
    assert parent.tags["sweep.best"] == whole_sweep.best
    best = whole_sweep.trials[int(whole_sweep.best[1:])]
    command = shlex.split(parent.tags["sweep.command"])
    assert f"optim.lr={best['params']['optim.lr']}" in command
    assert CheckpointStore(folder / whole_sweep.best / "checkpoints", None).latest() is not None
    others = [trial for trial in folder.glob("t*/checkpoints") if trial.parent.name != whole_sweep.best]
    assert others == []  # losers keep no checkpoints
    assert (folder / "report.html").exists()
    assert not (folder / ".ray").exists()


def test_the_same_command_again_starts_nothing(sweeps: SweepPlace, whole_sweep: SweepLeft) -> None:
    """It says so, shows what was found, and leaves the journal and MLflow as they are; more trials go on."""
    before = (sweeps.runs / "undisturbed" / JOURNAL).read_bytes()
    again = sweeps.start_sweep("undisturbed", *RANDOM, RAY_ADDRESS="nowhere:1")
    again.expect(0)  # it never asked Ray
    assert "finished; nothing to do" in again.output and whole_sweep.best in again.output
    assert (sweeps.runs / "undisturbed" / JOURNAL).read_bytes() == before
    assert_sweep_told(sweeps.runs, "undisturbed")
    fewer = sweeps.start_sweep("undisturbed", *RANDOM, "--trials", str(TRIALS - 1))
    fewer.expect(2)
    assert f"--trials {TRIALS} or more" in fewer.output


@pytest.mark.slow
def test_more_trials_and_then_the_winner_at_full_budget(sweeps: SweepPlace, whole_sweep: SweepLeft) -> None:
    """The trials there were are not trained again; the winner trains as a run of its own, on the whole budget."""
    sweeps.run_sweep("undisturbed", *RANDOM, "--trials", str(TRIALS + 1), "--then-train")
    folder = sweeps.runs / "undisturbed"
    assert_journal_whole(folder, TRIALS + 1)
    assert_sweep_told(sweeps.runs, "undisturbed")
    history = read_history(folder / JOURNAL)
    for number, trial in whole_sweep.trials.items():
        ending = history.trials[number].ending
        assert ending is not None and repr(ending.values) == trial["ending"][1]
    best = min((trial for trial in history.ended() if trial.ending), key=lambda trial: trial.ending.values[0])  # type: ignore[union-attr]
    run = sweeps.runs / "undisturbed-best"
    outcome, fields = read(run, "outcome.json"), read(run, "identity.json")["fields"]
    assert outcome["state"] == "finished" and outcome["tokens"] >= best.seen[-1].tokens
    assert fields["optim.lr"] == best.params["optim.lr"]
    assert fields["batch.sequences"] == best.params["batch.sequences"]
    assert nobody_runs(sweeps.runs)


@pytest.mark.slow
def test_a_diverging_corner_is_told_and_the_sweep_ends_well(sweeps: SweepPlace) -> None:
    """A learning rate of 1e3 besides sound ones: tagged, a finite penalty for the searcher, and no more."""
    space = ["--set-space", "optim.lr=[1e-2,1e3,1e30]", "--searcher", "grid", "--scheduler", "none", "--seeds", "2"]
    command = sweeps.run_sweep("corner", *space, *SHORT, "optim.clip_norm=null")
    seconds_until_gone(command.family)
    assert "nonfinite" in command.output and "Traceback" not in command.output
    history = read_history(command.run_dir / JOURNAL)
    endings = {trial.params["optim.lr"]: trial.ending for trial in history.ended()}
    assert endings[1e-2] is not None and endings[1e-2].reason == "completed"
    assert endings[1e30] is not None and endings[1e30].reason == "nonfinite"
    for ending in endings.values():
        assert ending is not None and math.isfinite(ending.values[0])
        assert (ending.reason == "nonfinite") == (ending.values[0] == PENALTY)
    told = assert_sweep_told(sweeps.runs, "corner")
    tags = {(run.tags["trial.point"], run.tags["stop_reason"], run.status) for run in told}
    assert ("2", "nonfinite", "FAILED") in tags and ("0", "completed", "FINISHED") in tags


@pytest.mark.slow
def test_a_sweep_in_which_nothing_trains_says_why(sweeps: SweepPlace) -> None:
    space = ["--set-space", "optim.lr=[1e29,1e30]", "--searcher", "grid", "--scheduler", "none"]
    command = sweeps.start_sweep("hopeless", *space, *SHORT, "optim.clip_norm=null")
    command.expect(3)
    assert "no trial of hopeless was completed" in command.output and "not finite" in command.output
    assert "Traceback" not in command.output
    parent = tracked(sweeps.runs, read(command.run_dir, "sweep.json")["mlflow_run_id"])
    assert parent.status == "FAILED"
    assert nobody_runs(sweeps.runs)


@pytest.mark.slow
def test_a_spent_budget_stops_the_sweep_and_a_larger_one_goes_on(sweeps: SweepPlace, whole_sweep: SweepLeft) -> None:
    """Exit code 75 and the reason in MLflow; afterwards as if there had been no budget."""
    two = [*RANDOM, "--trials", "2"]
    command = sweeps.start_sweep("spent", *two, "--max-tokens", "1")
    command.expect(75)
    assert "--max-tokens is used up" in command.output
    told = assert_sweep_told(sweeps.runs, "spent", "KILLED", "budget")
    assert "budget" in {run.tags["stop_reason"] for run in told}
    assert nobody_runs(sweeps.runs)
    again = sweeps.run_sweep("spent", *two, "--max-tokens", str(10**9))
    assert_journal_whole(again.run_dir, 2)
    assert_sweep_told(sweeps.runs, "spent")
    found, first = left_by(again.run_dir), {number: whole_sweep.trials[number] for number in range(2)}
    assert [trial["seen"] for trial in found.trials.values()] == [trial["seen"] for trial in first.values()]


@pytest.mark.slow
def test_a_population_really_exploits(sweeps: SweepPlace) -> None:
    """Through Tune: at least one member takes over, each segment is a run of its own below the sweep."""
    space = ["--set-space", "optim.lr=log(1e-4,1e-1)", "--searcher", "random", "--scheduler", "pbt", "--trials", "4"]
    command = sweeps.run_sweep("population", *space, "--evaluations", "4", "budget.steps=400")
    history = read_history(command.run_dir / JOURNAL)
    exploited = [trial for trial in history.trials.values() if trial.lineage]
    assert exploited and history.rounds == 3
    assert all(trial.ending is not None and trial.ending.reason == "completed" for trial in history.trials.values())
    for trial in exploited:
        for segment, exploit in enumerate(trial.lineage, 1):
            identity = read(command.run_dir / f"{trial.name}-x{segment}", "identity.json")
            run = tracked(sweeps.runs, identity["mlflow_run_id"])
            assert run.tags["trial.parent"] == f"t{exploit.parent:04d}"
            assert min(step for step, _ in run.history) > 0  # it began where its parent stood
        first = tracked(sweeps.runs, read(command.run_dir / trial.name, "identity.json")["mlflow_run_id"])
        assert (first.status, first.tags["stop_reason"]) == ("KILLED", "exploited")
    assert nobody_runs(sweeps.runs)


def test_a_sweep_is_a_line_of_its_own_among_the_runs(
    sweeps: SweepPlace, whole_sweep: SweepLeft, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished, never damaged; its trials are runs for every verb that takes one."""
    from orchestrator.cli import main

    where = ["--runs-dir", str(sweeps.runs)]
    assert main(["runs", *where, "--json"]) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    sweep = lines["undisturbed"]
    assert (sweep["kind"], sweep["state"], sweep["step"]) == ("sweep", "finished", sweep["total_steps"])
    assert not any(name.startswith("undisturbed/") for name in lines)
    assert "damaged" not in {line["state"] for line in lines.values()}
    assert main(["status", "undisturbed", *where]) == 0
    assert "orchestrate report undisturbed" in capsys.readouterr().out
    assert main(["status", f"undisturbed/{whole_sweep.best}", *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["state"] == "finished"
    assert left(sweeps.runs / "undisturbed" / whole_sweep.best).state == "finished"


def test_the_names_of_sweeps_and_runs_are_kept_apart(sweeps: SweepPlace, whole_sweep: SweepLeft) -> None:
    """A run refuses a sweep's name; a sweep refuses a run's, and that of another sweep."""
    run = sweeps.start("undisturbed")
    run.expect(2)
    assert "name of a sweep" in run.output
    (sweeps.runs / "a-run").mkdir()
    (sweeps.runs / "a-run" / "identity.json").write_text(json.dumps({"fingerprint": "a" * 64, "fields": {}}))
    for name, changed, part in (
        ("a-run", [], "name of a run"),
        ("undisturbed", ["optim.weight_decay=0.5"], "optim.weight_decay: 0.01 -> 0.5"),
        ("undisturbed", ["--search-seed", "1"], "sweep.seed: 0 -> 1"),
    ):
        sweep = sweeps.start_sweep(name, *RANDOM, *changed)
        sweep.expect(2)
        assert part in sweep.output and "Traceback" not in sweep.output
