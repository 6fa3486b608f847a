"""Laws of faults, through Ray: whatever is killed or interrupted, the run ends with the same bits and the same metrics.

One case per fault; `make chaos` repeats them at many steps, and tests/trainers/test_continuation.py stops and kills
the bare loop everywhere. Starting Ray costs far more than the training between the faults.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.orchestrator.faults import (
    PROJECT,
    STEPS,
    Place,
    alive,
    assert_same,
    assert_told_once,
    checkpoint_steps,
    claim_of,
    database_locked,
    left,
    newest_step,
    read,
    spoil_ray,
    tracked,
    wait_until_gone,
)
from tests.trainers.crash import Ending, merged

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_killing_a_worker_is_invisible(place: Place, two_workers: Ending) -> None:
    """Twice in one run, the second time the other rank: what goes wrong alike is not for that the same mistake."""
    command = place.start("worker-killed", "--workers", "2")
    for step, rank in ((50, 1), (130, 0)):
        command.wait_for_step(step)
        victims = command.workers()
        assert len(victims) == 2
        victims[rank].kill()
    command.expect(0)
    assert claim_of(command.run_dir).attempt == 3
    assert_same(command.run_dir, two_workers)
    assert_told_once(place.runs, command.run_dir)


def test_killing_the_driver_is_invisible(place: Place, two_workers: Ending) -> None:
    """The same command follows at once, while the dead driver's workers are still alive and Ray's files are torn."""
    killed = place.start("driver-killed", "--workers", "2")
    killed.wait_for_step(90)
    run_id = read(killed.run_dir, "identity.json")["mlflow_run_id"]
    workers = set(killed.workers())
    killed.kill_driver()
    died = time.monotonic()
    again = place.start("driver-killed", "--workers", "2")
    assert again.started - died < 0.1
    assert alive(workers), "the workers died with the driver: nothing was shown"
    spoiled = spoil_ray(killed.run_dir, "torn")
    assert any(path.name == "checkpoint_manager_snapshot.json" and "claim-1" in str(path) for path in spoiled)

    again.wait_until(lambda: claim_of(again.run_dir).generation == 2, "the second claim")
    standing = (newest_step(again.run_dir), checkpoint_steps(again.run_dir))
    again.wait_until(lambda: claim_of(again.run_dir).attempt > 0, "the workers of the second claim")
    assert (newest_step(again.run_dir), checkpoint_steps(again.run_dir)) == standing, "an old worker wrote"
    assert not wait_until_gone(killed.family, 30 - (time.monotonic() - died))

    again.expect(0)
    assert_same(again.run_dir, two_workers)
    assert assert_told_once(place.runs, again.run_dir).run_id == run_id


def test_stopping_twice_and_raising_the_budget_is_invisible(place: Place, one_worker: Ending, tmp_path: Path) -> None:
    """Ctrl-C, then SIGTERM, then the end, then a larger budget: as if the run had had that budget all along."""
    shorter = f"budget.steps={STEPS - 40}"
    resumed_at = 0
    for step, name in ((30, "SIGINT"), (20, "SIGTERM")):
        command = place.start("stopped", shorter)
        command.wait_for_step(resumed_at + step)
        command.interrupt() if name == "SIGINT" else command.send(signal.SIGTERM)
        command.expect(75)
        outcome = read(command.run_dir, "outcome.json")
        assert (outcome["state"], outcome["reason"]) == ("stopped", name)
        # A checkpoint of the very step it stopped at: going on repeats nothing.
        resumed_at = outcome["step"]
        assert resumed_at < STEPS - 40
        assert checkpoint_steps(command.run_dir)[-1] == newest_step(command.run_dir) == resumed_at
        told = assert_told_once(place.runs, command.run_dir, "KILLED")
        assert told.tags["stop_reason"] == name
        assert not wait_until_gone(command.family)
        assert "Traceback" not in command.output

    assert_state_is_needed(command.run_dir, one_worker, tmp_path)
    place.run("stopped", shorter).expect(0)
    place.run("stopped", f"budget.steps=+{40}", target="stopped").expect(0)
    assert_same(command.run_dir, one_worker)
    assert assert_told_once(place.runs, command.run_dir).run_id == told.run_id


def assert_state_is_needed(run_dir: Path, reference: Ending, folder: Path) -> None:
    """The negative control: the bare loop goes on from this very checkpoint, first whole, then without the moments."""
    for sabotage in (None, "moments"):
        copy = folder / f"without-{sabotage}"
        subprocess.run(["cp", "-r", str(run_dir), str(copy)], check=True)
        code = (
            "import sys, torch, trainers.__main__ as bare; from tests.trainers.attempts import sabotage;"
            f"torch.set_num_threads({os.cpu_count()}); sabotage({sabotage!r}); sys.exit(bare.main())"
        )
        config, budget = str(run_dir / "config.yaml"), f"budget.steps={STEPS}"
        bare = [sys.executable, "-c", code, config, budget, "--run-dir", str(copy)]
        ended = subprocess.run(bare, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, ended.stderr
        found = left(copy)
        same = found.digest == reference.digest and merged(found.rows) == merged(reference.rows)
        assert same is (sabotage is None)


def test_a_locked_store_is_invisible(place: Place, one_worker: Ending) -> None:
    """Nobody can write to MLflow until training is over; then every row arrives, once. It is a `--fresh` run besides:
    the same configuration gives the same bits again."""
    command = place.start("alone", "--fresh")
    command.run_dir = place.runs / "alone-2"
    command.wait_for_step(5)
    with database_locked(place.runs / "mlflow.db"):
        command.wait_until((command.run_dir / "outcome.json").exists, "the end of training")
        run_id = read(command.run_dir, "identity.json")["mlflow_run_id"]
    command.expect(0)
    assert_same(command.run_dir, one_worker)
    assert assert_told_once(place.runs, command.run_dir).run_id == run_id


@pytest.mark.parametrize("workers", [1, 2])
def test_training_that_cannot_go_on_says_so(place: Place, workers: int) -> None:
    """A rate at which everything overflows: every worker ends, nobody tries again, the end states are true."""
    name = f"overflowing-{workers}"
    absurd = ["optim.lr=1e30", "optim.clip_norm=null", "optim.on_nonfinite=raise", "schedule.warmup_steps=0"]
    command = place.run(name, *absurd, "--workers", str(workers)).expect(3)
    assert "not finite" in command.output and "optim.lr" in command.output
    assert "Traceback" not in command.output
    assert claim_of(command.run_dir).attempt == 1
    assert read(command.run_dir, "outcome.json")["state"] == "failed"
    told = tracked(place.runs, read(command.run_dir, "identity.json")["mlflow_run_id"])
    assert told.status == "FAILED"
