"""Laws of faults, through Ray: whatever is killed or interrupted, the run ends with the same bits and the same metrics.

One case per fault; `make chaos` repeats them at many steps, and tests/trainers/test_continuation.py stops and kills
the bare loop everywhere. Starting Ray costs far more than the training between the faults.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.ray_trainer import WORKER_RESTARTS
from orchestrator.worker import no_accident
from tests.orchestrator.episodes import kill_driver, kill_workers, lock_store, stop
from tests.orchestrator.faults import (
    PROJECT,
    STEPS,
    Place,
    assert_same,
    assert_told_once,
    claim_of,
    left,
    newest_step,
    read,
    seconds_until_gone,
    tracked,
)
from tests.trainers.crash import Ending, merged
from trainers.claim import Claim, Guard
from trainers.context import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_killing_a_worker_is_invisible(place: Place, two_workers: Ending) -> None:
    """Twice in one run, the second time the other rank."""
    kill_workers(place, "worker-killed", [(50, 1), (130, 0)], two_workers)


@pytest.mark.slow
def test_crashes_that_lie_apart_are_all_mended(place: Place, two_workers: Ending) -> None:
    """More of them than Ray mends in a row."""
    kills = [(30 + 40 * index, index % 2) for index in range(WORKER_RESTARTS + 2)]
    kill_workers(place, "often-killed", kills, two_workers)


def test_killing_the_driver_is_invisible(place: Place, two_workers: Ending) -> None:
    """And so is that Ray's own files are torn."""
    kill_driver(place, "driver-killed", 90, two_workers, spoil="torn")


@pytest.mark.slow
def test_stopping_twice_and_raising_the_budget_is_invisible(place: Place, one_worker: Ending, tmp_path: Path) -> None:
    """Ctrl-C, then SIGTERM, then the end, then a larger budget: as if the run had had that budget all along."""
    shorter = f"budget.steps={STEPS - 40}"
    first, _ = stop(place, "stopped", [shorter], 30, "SIGINT")
    stopped_at = read(first.run_dir, "outcome.json")["step"]
    stop(place, "stopped", [shorter], stopped_at + 10, "SIGTERM")
    assert_state_is_needed(first.run_dir, one_worker, tmp_path)
    place.run("stopped", shorter).expect(0)
    told = assert_told_once(place.runs, first.run_dir)
    place.run("stopped", "budget.steps=+40", target="stopped").expect(0)
    assert_same(first.run_dir, one_worker)
    assert assert_told_once(place.runs, first.run_dir).run_id == told.run_id


def test_sigterm_to_the_workers_too_is_a_stop(place: Place, one_worker: Ending) -> None:
    """Workers that are ended together with the driver's wish to stop: started again, they stop at once."""
    command = place.start("ended")
    command.wait_for_step(50)
    workers = command.workers()
    for process in [psutil.Process(command.pid), *workers]:
        process.terminate()
    command.expect(75)
    assert "Traceback" not in command.output
    outcome = read(command.run_dir, "outcome.json")
    assert (outcome["state"], outcome["reason"]) == ("stopped", "SIGTERM")
    told = assert_told_once(place.runs, command.run_dir, "KILLED")
    seconds_until_gone(command.family)
    again = place.run("ended").expect(0)
    assert_same(again.run_dir, one_worker)
    assert assert_told_once(place.runs, again.run_dir).run_id == told.run_id


def assert_state_is_needed(run_dir: Path, whole: Ending, folder: Path) -> None:
    """The negative control: the bare loop goes on from this very checkpoint, first as it is, then without moments."""
    for piece in (None, "moments"):
        copy = folder / f"without-{piece}"
        shutil.copytree(run_dir, copy)
        code = (
            "import sys, torch, trainers.__main__ as bare; from tests.trainers.attempts import sabotage;"
            f"torch.set_num_threads({os.cpu_count()}); sabotage({piece!r}); sys.exit(bare.main())"
        )
        config, budget = str(run_dir / "config.yaml"), f"budget.steps={STEPS}"
        bare = [sys.executable, "-c", code, config, budget, "--run-dir", str(copy)]
        ended = subprocess.run(bare, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, ended.stderr
        found = left(copy)
        same = found.digest == whole.digest and merged(found.rows) == merged(whole.rows)
        assert same is (piece is None)


@pytest.mark.slow
def test_a_locked_store_is_invisible(place: Place, one_worker: Ending) -> None:
    """Nobody can write to MLflow until training is over; then every row arrives, once. It is a `--fresh` run besides:
    the same configuration gives the same bits again."""
    command = place.start("alone", "--fresh")
    command.run_dir = place.runs / "alone-2"
    lock_store(place, command, one_worker)


@pytest.mark.slow
def test_training_that_cannot_go_on_says_so(place: Place) -> None:
    """A rate at which everything overflows: both workers end, nobody tries again, the end states are true."""
    absurd = ["optim.lr=1e30", "optim.clip_norm=null", "optim.on_nonfinite=raise", "schedule.warmup_steps=0"]
    command = place.run("overflowing", *absurd, "--workers", "2").expect(3)
    assert "not finite" in command.output and "optim.lr" in command.output
    assert "Traceback" not in command.output
    assert claim_of(command.run_dir).attempt == 1
    assert read(command.run_dir, "outcome.json")["state"] == "failed"
    told = tracked(place.runs, read(command.run_dir, "identity.json")["mlflow_run_id"])
    assert told.status == "FAILED"


@pytest.mark.slow
def test_a_crash_that_comes_back_ends_the_run(place: Place) -> None:
    """A sample cannot be written, which nobody foresaw: Ray tries again, and it is the same at the same place."""
    run_dir = place.runs / "crashing"
    (run_dir / "samples" / "step-00000040.json").mkdir(parents=True)  # where a file will be written
    command = place.run("crashing", "--workers", "2").expect(3)
    assert "crashed twice alike" in command.output and "samples" in command.output
    assert "Traceback" not in command.output
    assert "Traceback" in (run_dir / "logs" / "failure-rank-00000.txt").read_text()
    assert read(run_dir, "outcome.json")["step"] == newest_step(run_dir) == 40
    assert claim_of(run_dir).attempt == 3  # the third finds that the run has ended
    told = tracked(place.runs, read(run_dir, "identity.json")["mlflow_run_id"])
    assert told.status == "FAILED"


@pytest.mark.slow
def test_a_save_that_fails_on_one_rank_ends_the_others(place: Place) -> None:
    """Rank 0 alone cannot commit, and is told not to go on without; the other would wait for it for ever."""
    run_dir = place.runs / "unsaved"
    (run_dir / "checkpoints" / "latest" / "a folder").mkdir(parents=True)  # where a pointer will be moved to
    command = place.run("unsaved", "--workers", "2", "checkpoint.on_disk_full=stop").expect(3)
    assert "was not saved" in command.output and "Traceback" not in command.output
    assert claim_of(run_dir).attempt == 2  # Ray ended both; the second attempt finds that the run has ended
    assert read(run_dir, "outcome.json")["state"] == "failed"


def test_a_crash_elsewhere_is_an_accident(tmp_path: Path) -> None:
    with Claim.acquire(tmp_path / "run") as claim:
        guard = Guard.begin_attempt(tmp_path / "run", claim.generation)
        context = RunFolder(tmp_path / "run", tmp_path, guard, rank=0, world_size=2, local_rank=0)
        other = RunFolder(tmp_path / "run", tmp_path, guard, rank=1, world_size=2, local_rank=1)
        record = tmp_path / "run" / "metrics.jsonl"
        assert not no_accident(context, OSError("peer gone"))
        assert not no_accident(other, OSError("peer gone"))  # both ranks of one attempt
        record.write_text("a new row\n")
        assert not no_accident(context, OSError("peer gone"))
        assert not no_accident(context, OSError("something else"))
        assert no_accident(context, OSError("something else"))
