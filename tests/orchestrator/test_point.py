"""Laws of a point in training: turns, rests, stops and restarts change no bit, and every evaluation is told once.

In this process, without Ray. What a killed process leaves behind is made from what it would have left; real kills are
in test_sweep_faults.py.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.sweeps import point as points
from orchestrator.sweeps.point import TURN, PointJob, PointRun, Said
from orchestrator.sweeps.settings import SweepSettings
from orchestrator.sweeps.trials import in_tokens, run_of
from tests.trainers.crash import Ending, ending, merged
from tests.trainers.small_runs import config_for, write_text
from trainers.claim import Claim
from trainers.config import RunConfig
from trainers.context import LocalContext, request_stop
from trainers.identity import read_json
from trainers.record import read_rows, series

STEPS, EVERY = 12, 3
POINT = {"optim.lr": 1e-2}
DIVERGING = {"optim.lr": 1e30}
"""so that everything overflows in a few steps, whatever is clipped"""


class Stage:
    """A folder of one sweep with a small text: its points, and the same trainings alone."""

    def __init__(self, folder: Path):
        self.folder = folder
        base = config_for(write_text(folder), logging={"every_steps": 1})
        self.base = in_tokens(base, [STEPS * base.tokens_per_step])
        self.tokens = STEPS * base.tokens_per_step
        self.every = EVERY * base.tokens_per_step
        self.settings = SweepSettings(space=[], trials=4, tokens=self.tokens, evaluations=STEPS // EVERY)
        self.milestones = list(range(self.every, self.tokens + 1, self.every))
        self.claims: dict[str, Claim] = {}

    def config(self, params: dict[str, Any] = POINT, seed_index: int = 0) -> RunConfig:
        return run_of(self.base, params, self.settings, seed_index=seed_index)

    def alone(self, seed_index: int = 0) -> Ending:
        """The same training without a sweep."""
        from trainers.loop import train

        folder = self.folder / f"alone-{seed_index}"
        if not folder.exists():
            context = LocalContext(folder, self.folder / ".cache")
            train(self.config(seed_index=seed_index), context)
            context.close()
        return ending(folder, 0)

    def job(self, *names: str, params: dict[str, Any] = POINT, until: int | None = None) -> PointJob:
        """A point of these folders, claimed anew as a driver does."""
        seeds = []
        for index, name in enumerate(names):
            if name in self.claims:
                self.claims[name].release()
            self.claims[name] = claim = Claim.acquire(self.folder / name)
            seeds.append(
                {
                    "config": self.config(params, index).model_dump(mode="json"),
                    "run_dir": str(self.folder / name),
                    "cache_dir": str(self.folder / ".cache"),
                    "generation": claim.generation,
                    "threads": 1,
                    "tracking": {},
                    "workers": 1,
                    "share": {},
                }
            )
        return PointJob(0, seeds, ["val/loss"], self.milestones, until)

    def stop(self, job: PointJob, reason: str) -> None:
        for seed in job.seeds:
            request_stop(Path(seed["run_dir"]), seed["generation"], reason)

    def left(self, name: str) -> Ending:
        return ending(self.folder / name, 0)

    def outcome(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / name / "outcome.json") or {}


@pytest.fixture(scope="module")
def shared_stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    import torch

    torch.set_num_threads(1)
    return Stage(tmp_path_factory.mktemp("points"))


@pytest.fixture
def stage(shared_stage: Stage) -> Iterator[Stage]:
    yield shared_stage
    for claim in shared_stage.claims.values():
        claim.release()
    shared_stage.claims.clear()


def to_the_end(run: PointRun) -> tuple[list[Said], Said]:
    """The evaluations it told, letting it go on after each, and how it ended; the thread is gone."""
    told = []
    while not (said := run.next()).state:
        told.append(said)
    assert run.end()
    return told, said


def losses(ending: Ending) -> list[float]:
    return [value for (_, name), value in sorted(merged(ending.rows).items()) if name == "val/loss"]


def assert_same(found: Ending, whole: Ending) -> None:
    assert found.state == whole.state == "finished"
    assert merged(found.rows) == merged(whole.rows)
    assert found.digest == whole.digest


# ---- undisturbed ---------------------------------------------------------------------------------------------


def test_one_seed_trains_as_it_would_alone(stage: Stage) -> None:
    told, end = to_the_end(PointRun(stage.job("t0000")))
    assert (end.state, end.reason) == ("finished", "completed") and end.train_s > 0
    assert_same(stage.left("t0000"), stage.alone())
    assert [said.tokens for said in told] == stage.milestones
    assert [said.values for said in told] == [[loss] for loss in losses(stage.alone())]
    assert {said.spread for said in told} == {0.0}


def test_seeds_that_take_turns_train_as_they_would_alone(stage: Stage) -> None:
    """Each to the next milestone while the others wait; told is their mean and its spread."""
    names = [f"t0001-s{index}" for index in range(3)]
    told, end = to_the_end(PointRun(stage.job(*names)))
    assert (end.state, end.reason) == ("finished", "completed")
    alone = [stage.alone(index) for index in range(3)]
    for name, whole in zip(names, alone, strict=True):
        assert_same(stage.left(name), whole)
    assert len({whole.digest for whole in alone}) == 3
    assert [said.tokens for said in told] == stage.milestones
    for said, values in zip(told, zip(*map(losses, alone), strict=True), strict=True):
        assert said.values == [sum(values) / 3] and said.spread == statistics.stdev(values)


def test_a_turn_that_loses_state_is_noticed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the moments of the optimizer a seed that waited goes another way."""
    from trainers.engine import TorchEngine

    load = TorchEngine.load
    monkeypatch.setattr(TorchEngine, "load", lambda self, files, state, *, optimizer: load(self, files, state, optimizer=False))  # fmt: skip # noqa: E501
    to_the_end(PointRun(stage.job("t0002-s0", "t0002-s1")))
    assert stage.left("t0002-s0").digest != stage.alone(0).digest


# ---- rests of a population -------------------------------------------------------------------------------------


def test_a_member_rests_and_goes_on(stage: Stage) -> None:
    for round_end in stage.milestones:
        told, end = to_the_end(PointRun(stage.job("t0003", until=round_end)))
        assert told[-1].tokens == round_end
        if round_end < stage.tokens:
            assert (end.state, end.reason) == ("stopped", TURN)
            assert stage.outcome("t0003")["tokens"] == round_end
    assert_same(stage.left("t0003"), stage.alone())


@pytest.mark.parametrize("killed", ["after the row", "after the checkpoint"])
def test_a_member_killed_at_the_end_of_its_round_rests_there(
    killed: str, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither short of it nor an evaluation further, or what others take over from it would depend on the kill."""
    first, second, name = *stage.milestones[:2], killed.replace(" ", "-")
    to_the_end(PointRun(stage.job(name, until=first)))
    shutil.copytree(stage.folder / name, stage.folder / f"{name}-before")
    to_the_end(PointRun(stage.job(name, until=second)))
    resting = stage.left(name)
    for trial in ("mended", "control"):
        folder = stage.folder / f"{name}-{trial}"
        shutil.copytree(stage.folder / name, folder)
        (folder / "outcome.json").unlink()
        if killed == "after the row":
            shutil.rmtree(folder / "checkpoints")
            shutil.copytree(stage.folder / f"{name}-before" / "checkpoints", folder / "checkpoints")
        if trial == "control":
            monkeypatch.setattr(points, "saved_tokens", lambda folder: 0)
        told, end = to_the_end(PointRun(stage.job(folder.name, until=second)))
        assert [said.tokens for said in told[:2]] == [first, second]
        if trial == "mended":
            assert (end.reason, stage.left(folder.name).digest) == (TURN, resting.digest)
            assert [said.tokens for said in told] == [first, second]
    if killed == "after the checkpoint":
        assert stage.left(f"{name}-control").digest != resting.digest


# ---- stops and kills -------------------------------------------------------------------------------------------


def test_a_stop_while_it_waits_for_a_verdict_ends_it_in_seconds(stage: Stage) -> None:
    job = stage.job("t0004")
    run = PointRun(job)
    run.next()
    asked = time.monotonic()
    stage.stop(job, "asha")
    assert run.end() and time.monotonic() - asked < 20
    outcome = stage.outcome("t0004")
    assert (outcome["state"], outcome["reason"], outcome["tokens"]) == ("stopped", "asha", stage.every)


def test_seeds_that_wait_for_a_verdict_are_stopped_together(stage: Stage) -> None:
    job = stage.job("t0005-s0", "t0005-s1")
    run = PointRun(job)
    run.next()
    stage.stop(job, "asha")
    assert run.end()
    assert [stage.outcome(f"t0005-s{index}")["tokens"] for index in range(2)] == [stage.every, stage.every]


@pytest.mark.parametrize("seeds", [1, 2])
def test_stopped_and_gone_on_is_as_never_stopped(seeds: int, stage: Stage) -> None:
    """After the second evaluation, by the person; what was told before is told again, and the driver knows it."""
    names = [f"t0006-{seeds}-s{index}" for index in range(seeds)]
    job = stage.job(*names)
    run = PointRun(job)
    before = [run.next(), run.next()]
    stage.stop(job, "user")
    assert not all(said.state == "finished" for said in [run.next()])
    assert run.end()
    told, end = to_the_end(PointRun(stage.job(*names)))
    assert end.state == "finished"
    assert [said.tokens for said in told] == stage.milestones
    assert [replace(said, train_s=0.0) for said in told[:2]] == [replace(said, train_s=0.0) for said in before]
    for index, name in enumerate(names):
        assert_same(stage.left(name), stage.alone(index))


def test_killed_in_its_first_turn_the_second_seed_begins_and_the_first_waits(stage: Stage) -> None:
    """The first seed has had its turn; it must not run ahead of the rung where both are judged."""
    job = stage.job("t0007-s0", "t0007-s1")
    run = PointRun(job)
    run.next()
    stage.stop(job, "user")
    assert run.end()
    for index in range(2):
        assert stage.outcome(f"t0007-s{index}")["tokens"] == stage.every
    shutil.rmtree(stage.folder / "t0007-s1" / "checkpoints")
    for name in ("outcome.json", "metrics.jsonl"):
        (stage.folder / "t0007-s1" / name).unlink()
    run = PointRun(job := stage.job("t0007-s0", "t0007-s1"))
    assert run.next().tokens == stage.every
    assert stage.outcome("t0007-s0")["tokens"] == stage.outcome("t0007-s1")["tokens"] == stage.every
    stage.stop(job, "user")
    assert run.end()


def test_a_restart_is_noted_where_there_was_one(stage: Stage) -> None:
    """Turns are no restarts."""
    job = stage.job("t0008-s0", "t0008-s1")
    to_the_end(PointRun(job))
    assert "its process died" not in (stage.folder / "t0008-s0" / "logs" / "events.jsonl").read_text()
    for name in ("t0008-s0", "t0008-s1"):
        (stage.folder / name / "outcome.json").unlink()
    to_the_end(PointRun(job))
    assert "its process died" in (stage.folder / "t0008-s0" / "logs" / "events.jsonl").read_text()


# ---- failures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_diverges_ends_as_nonfinite(seeds: int, stage: Stage) -> None:
    names = [f"t0009-{seeds}-s{index}" for index in range(seeds)]
    told, end = to_the_end(PointRun(stage.job(*names, params=DIVERGING)))
    assert (end.state, end.reason) == ("failed", "nonfinite") and "not finite" in end.message
    assert stage.outcome(names[0])["state"] == "failed"
    assert len(told) < len(stage.milestones)


def test_what_was_never_reported_is_an_error_that_says_so(stage: Stage) -> None:
    job = replace(stage.job("t0010"), metrics=["val/f1"])
    told, end = to_the_end(PointRun(job))
    assert not told and end.state == "failed" and end.reason == "error"
    assert "val/f1 is never reported" in end.message


def test_out_of_memory_is_told_from_other_errors(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    import trainers.run

    for error, kind in ((RuntimeError("DefaultCPUAllocator: can't allocate memory"), "oom"), (OSError("x"), "error")):

        def fail(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(trainers.run.Run, "restore", fail)
        _, end = to_the_end(PointRun(stage.job(f"t0011-{kind}")))
        assert (end.state, end.reason) == ("failed", kind) and str(error) in end.message


def test_the_clock_stands_still_while_it_waits(stage: Stage) -> None:
    run = PointRun(job := stage.job("t0012"))
    first = run.next()
    time.sleep(1.0)
    second = run.next()
    assert math.isfinite(first.train_s) and 0 < second.train_s - first.train_s < 1.0
    stage.stop(job, "user")
    assert run.end()


# ---- what counts as an evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["train/loss", "perf/tokens_per_s"])
def test_a_logged_step_is_no_evaluation(metric: str, stage: Stage) -> None:
    """Whatever the objective: what every step logs is told where the model was evaluated, and nowhere else."""
    name = f"t0013-{metric.partition('/')[0]}"
    job = replace(stage.job(name), metrics=[metric])
    first, _ = to_the_end(PointRun(job))
    again, end = to_the_end(PointRun(replace(stage.job(name), metrics=[metric])))
    assert end.state == "finished"
    logged = dict(series(stage.folder / name / "metrics.jsonl", metric))
    for told in (first, again):
        assert [said.tokens for said in told] == stage.milestones
    assert [said.values for said in again] == [[logged[step]] for step in range(EVERY, STEPS + 1, EVERY)]
    assert len(logged) > len(stage.milestones)  # the control: there was more to be mistaken for one


def test_the_record_is_read_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is asked, also where the rows of a step come apart."""
    job = stage.job("t0014")
    path = stage.folder / "t0014" / "metrics.jsonl"
    rows = [{"step": step, "tokens": 10 * step, "time_ms": 1, "phase": "main", "train/loss": 1.0 / step} for step in range(1, 31)]  # fmt: skip # noqa: E501
    rows += [{"step": step, "tokens": 10 * step, "time_ms": 2, "phase": "main", "val/loss": 2.0 / step} for step in (10, 20)]  # fmt: skip # noqa: E501
    rows += [{"step": 10, "tokens": 100, "time_ms": 3, "phase": "main", "val/loss": 9.0}]
    counted = 0

    def counting(path: Path, *, offset: int = 0) -> Iterator[Any]:
        nonlocal counted
        for found in read_rows(path, offset=offset):
            counted += 1
            yield found

    monkeypatch.setattr(points, "read_rows", counting)
    seed = points.SeedRun(job.seeds[0], ["train/loss", "val/loss"], lambda: None, threading.Event())
    asked_anew = 0
    for row in rows:
        with path.open("a") as record:
            record.write(json.dumps(row) + "\n")
        found = seed.evaluations()
        before = counted
        fresh = points.SeedRun(job.seeds[0], ["train/loss", "val/loss"], lambda: None, threading.Event())
        assert fresh.evaluations() == found
        counted, asked_anew = before, asked_anew + counted - before
    assert found == [(100, (1 / 10, 2 / 10)), (200, (1 / 20, 2 / 20))]  # the first write of a value wins
    assert counted == len(rows)
    assert asked_anew == len(rows) * (len(rows) + 1) / 2  # the control: one that forgets reads it all each time
