"""What may befall one run through Ray, with the laws that hold then. A test plays each once, `make chaos` many times.

Each returns what it measured; an AssertionError is a law broken.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.orchestrator.faults import (
    SAVE_EVERY,
    Command,
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
    seconds_until_gone,
    spoil_ray,
)
from tests.trainers.crash import Ending, merged
from trainers.record import read_rows

Measured = dict[str, float | int | str]


def kill_workers(place: Place, name: str, kills: Sequence[tuple[int, int]], whole: Ending) -> Measured:
    """SIGKILL to a worker once the record has reached a step, as often as `kills` says: (step, rank), two workers."""
    command = place.start(name, "--workers", "2")
    redone, recovered_s = [0], [0.0]
    for step, rank in kills:
        command.wait_for_step(step)
        victims = command.workers()
        assert len(victims) == 2
        victims[rank].kill()
        died, at = time.time(), newest_step(command.run_dir)
        redone.append(at - max([step for step in checkpoint_steps(command.run_dir) if step <= at], default=0))
        command.wait_for_step(at + 10)
        recovered_s.append(first_row_after(command.run_dir, at + 2) - died)
    command.expect(0)
    assert claim_of(command.run_dir).attempt == 1 + len(kills)
    assert command.output.count("a worker died") == len(kills) and "Traceback" not in command.output
    assert max(redone) <= 2 * SAVE_EVERY  # the checkpoint at the border may still have been under way
    assert_same(command.run_dir, whole)
    assert_told_once(place.runs, command.run_dir)
    return {"steps_redone": max(redone), "kill_to_new_step_s": round(max(recovered_s), 2)}


def first_row_after(run_dir: Path, step: int) -> float:
    """When the record got its first row beyond `step`, in seconds since the epoch."""
    return next(row["time_ms"] for row, _ in read_rows(run_dir / "metrics.jsonl") if row["step"] > step) / 1000


def kill_driver(
    place: Place, name: str, step: int, whole: Ending, *, workers: int = 2, spoil: str | None = None
) -> Measured:
    """SIGKILL to the driver, and the same command at once, while the dead one's workers live on.

    `spoil` damages every file that Ray keeps in the run's folder: torn, empty or foreign.
    """
    killed = place.start(name, "--workers", str(workers))
    killed.wait_for_step(step)
    run_id = read(killed.run_dir, "identity.json")["mlflow_run_id"]
    old_workers = set(killed.workers())
    killed.kill_driver()
    died = time.monotonic()
    again = place.start(name, "--workers", str(workers))
    assert again.started - died < 0.1
    assert alive(old_workers), "the workers died with the driver: nothing was shown"
    spoiled = spoil_ray(killed.run_dir, spoil) if spoil else []
    with ThreadPoolExecutor(1) as pool:
        orphans_s = pool.submit(seconds_until_gone, killed.family)
        see_that_old_workers_write_nothing(again)
    again.expect(0)
    assert_same(again.run_dir, whole)
    assert assert_told_once(place.runs, again.run_dir).run_id == run_id
    return {"last_orphan_after_s": orphans_s.result(), "files_of_ray_damaged": len(spoiled)}


def see_that_old_workers_write_nothing(again: Command) -> None:
    """From the second claim until its own workers begin."""
    again.wait_until(lambda: claim_of(again.run_dir).generation == 2, "the second claim")
    standing = (newest_step(again.run_dir), checkpoint_steps(again.run_dir))
    again.wait_until(lambda: claim_of(again.run_dir).attempt > 0, "the workers of the second claim")
    assert (newest_step(again.run_dir), checkpoint_steps(again.run_dir)) == standing, "an old worker wrote"


def stop(place: Place, name: str, arguments: Sequence[str], step: int, how: str) -> tuple[Command, Measured]:
    """A signal once the record has reached `step`: SIGINT as Ctrl-C sends it, to all processes of the terminal."""
    command = place.start(name, *arguments)
    command.wait_for_step(step)
    command.look_around()
    asked = time.monotonic()
    command.interrupt() if how == "SIGINT" else command.send(signal.Signals[how])
    command.expect(75)
    ended_s = time.monotonic() - asked
    outcome = read(command.run_dir, "outcome.json")
    assert (outcome["state"], outcome["reason"]) == ("stopped", how)
    # A checkpoint of the very step it stopped at: going on repeats nothing.
    assert checkpoint_steps(command.run_dir)[-1] == newest_step(command.run_dir) == outcome["step"]
    assert assert_told_once(place.runs, command.run_dir, "KILLED").tags["stop_reason"] == how
    orphans_s = seconds_until_gone(command.family)
    assert "Traceback" not in command.output
    return command, {
        "step": outcome["step"],
        "signal_to_exit_s": round(ended_s, 2),
        "last_orphan_after_s": orphans_s,
    }


def lock_store(place: Place, command: Command, whole: Ending, *, until_the_end: bool = False) -> Measured:
    """Nobody can write to MLflow from step 5 until training is over; or until the command has given up on it, so that
    the same command must bring the rows later. Every row arrives, once."""
    command.wait_for_step(5)
    with database_locked(place.runs / "mlflow.db"):
        command.wait_until((command.run_dir / "outcome.json").exists, "the end of training")
        run_id = read(command.run_dir, "identity.json")["mlflow_run_id"]
        if until_the_end:
            command.expect(0)
            assert "wait for MLflow" in command.output
    command.expect(0)
    if until_the_end:
        later = place.run(command.run_dir.name).expect(0)
        assert "nothing to do" in later.output
    assert_same(command.run_dir, whole)
    assert assert_told_once(place.runs, command.run_dir).run_id == run_id
    return {"until": "the command ended" if until_the_end else "training ended"}


LARGER = ["model.d_model=192", "model.n_layers=4", "model.context_length=64", "batch.micro_sequences=4"]
LARGER += ["evaluation.every_steps=100", "checkpoint.every_steps=20", "--workers", "2"]
"""1.8 M parameters"""
LONG_RUN_S = 900.0  # 1,200 steps of them, disturbed or not, on a machine that others use too


def goodput(place: Place, name: str, *, steps: int, every_s: float, kills: int) -> Measured:
    """The share of time and of steps that was useful with a SIGKILL to a worker every so often."""
    arguments = [*LARGER, f"budget.steps={steps}"]
    whole = place.start(f"{name}-whole", *arguments).expect(0, LONG_RUN_S)
    command = place.start(name, *arguments)
    command.wait_for_step(1)
    redone, due = 0, time.monotonic()
    for count in range(kills):
        due += every_s
        command.wait_until(lambda: time.monotonic() >= due, "the next kill")  # noqa: B023
        if not (victims := command.workers()):
            continue  # they are being started again
        victims[count % len(victims)].kill()
        at = newest_step(command.run_dir)
        redone += at - max([step for step in checkpoint_steps(command.run_dir) if step <= at], default=0)
    command.expect(0, LONG_RUN_S)
    assert merged(left(command.run_dir).rows) == merged(left(whole.run_dir).rows)
    useful_s, wall_s = training_s(whole.run_dir), training_s(command.run_dir)
    return {
        "kills": claim_of(command.run_dir).attempt - 1,
        "useful_time": round(useful_s / wall_s, 3),
        "useful_steps": round(steps / (steps + redone), 3),
        "undisturbed_s": round(useful_s, 1),
    }


def training_s(run_dir: Path) -> float:
    """From the first row to the last."""
    times = [row["time_ms"] for row, _ in read_rows(run_dir / "metrics.jsonl")]
    return (max(times) - min(times)) / 1000
