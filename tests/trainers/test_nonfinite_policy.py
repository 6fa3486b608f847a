"""What `train` does about an update whose loss is NaN: on every rank the same, recorded once, undone nowhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainers.crash import Ending, Plan, assert_same, attempt, finished, killed, merged
from tests.trainers.small_runs import config_for, write_text
from trainers.config import RunConfig

BAD = 7  # the update after step 7 makes step 8; the checkpoint before it is that of step 6
COUNTER = "incidents/nonfinite"
TWO = {"workers": 2, "batch": {"sequences": 4, "micro_sequences": 1}}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def policy(text: Path, on_nonfinite: str, limit: int = 10, **changes: object) -> RunConfig:
    return config_for(text, optim={"lr": 1e-2, "on_nonfinite": on_nonfinite, "nonfinite_limit": limit}, **changes)


@pytest.fixture(scope="module")
def left_out(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Ending:
    """The reference: the same run with sound losses, in which the engine left that one update out."""
    plan = Plan(left_out=(BAD,))
    return finished(attempt(policy(text, "skip"), tmp_path_factory.mktemp("left-out") / "run", plan))


@pytest.fixture(scope="module")
def skipped(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Ending:
    return finished(attempt(policy(text, "skip"), tmp_path_factory.mktemp("skipped") / "run", Plan(poison=(BAD,))))


def counters(ending: Ending) -> dict[int, float]:
    """step -> how many updates had been left out, where that was recorded; an AssertionError where it was twice."""
    return {step: value for (step, name), value in merged(ending.rows).items() if name == COUNTER}


def assert_same_but_for_the_bad_step(ending: Ending, reference: Ending) -> None:
    """The same weights and moments, and the same metrics except those that speak of the bad step itself."""
    assert ending.tensors == reference.tensors
    own, other = merged(ending.rows), merged(reference.rows)
    spoiled = {(BAD + 1, name) for name in ("train/loss", "train/grad_norm", COUNTER)}
    assert own.keys() - spoiled == other.keys() - spoiled
    assert all(own[key] == other[key] for key in own.keys() - spoiled)


def test_a_skipped_update_leaves_no_trace_but_its_count(skipped: Ending, left_out: Ending) -> None:
    assert_same_but_for_the_bad_step(skipped, left_out)
    assert counters(skipped) == {BAD + 1: 1} and counters(left_out) == {}


def test_the_reference_differs_from_a_run_that_left_nothing_out(text: Path, left_out: Ending, tmp_path: Path) -> None:
    """The negative control of the law above."""
    assert finished(attempt(policy(text, "skip"), tmp_path / "run")).tensors != left_out.tensors


def test_a_skipped_update_is_replayed_as_it_was(text: Path, skipped: Ending, tmp_path: Path) -> None:
    """Killed after the bad step, before the next checkpoint: it is met again, and recorded once."""
    plan = Plan(poison=(BAD,))
    assert killed(attempt(policy(text, "skip"), tmp_path / "run", replace(plan, kill_at=BAD + 1)))
    assert_same(finished(attempt(policy(text, "skip"), tmp_path / "run", plan)), skipped)


def test_stop_saves_and_the_run_can_go_on(text: Path, skipped: Ending, tmp_path: Path) -> None:
    plan = Plan(poison=(BAD,))
    stopped = attempt(policy(text, "stop"), tmp_path / "run", plan)
    assert (stopped.state, stopped.reason, stopped.step) == ("stopped", "nonfinite", BAD + 1)
    assert counters(stopped) == {BAD + 1: 1}
    assert_same(finished(attempt(policy(text, "stop"), tmp_path / "run", plan)), skipped)


def test_raise_fails_and_leaves_the_last_good_checkpoint(text: Path, tmp_path: Path) -> None:
    failed = attempt(policy(text, "raise"), tmp_path / "run", Plan(poison=(BAD,)))
    assert failed.exitcode == 3 and f"step {BAD + 1}" in failed.failure
    assert failed.step == 6 and counters(failed) == {BAD + 1: 1}


def test_the_message_names_the_sequences_and_the_place(text: Path, tmp_path: Path) -> None:
    """This loss was spoilt once only, so that the second look accuses nobody; test_diagnosis.py has those it does."""
    failed = attempt(policy(text, "raise"), tmp_path / "run", Plan(poison=(BAD,)))
    assert f"step {BAD + 1}. Sequences 28 to 31 of phase 'main': run once more, every output" in failed.failure


def test_the_limit_counts_updates_in_a_row(text: Path, tmp_path: Path) -> None:
    config = policy(text, "skip", limit=3)
    apart = finished(attempt(config, tmp_path / "apart", Plan(poison=(3, 4, 6, 7))))
    assert counters(apart) == {4: 1, 5: 2, 7: 3, 8: 4}
    failed = attempt(config, tmp_path / "in a row", Plan(poison=(6, 7, 8, 9)))
    assert failed.exitcode == 3 and "step 9, 3 in a row" in failed.failure
    assert failed.step == 6


def test_rows_of_bad_updates_count_on_after_a_restart(text: Path, tmp_path: Path) -> None:
    """A stop in the middle does not give three more tries."""
    config, plan = policy(text, "skip", limit=3), Plan(poison=(4, 5, 6))
    assert attempt(config, tmp_path / "run", replace(plan, stop_at=6)).state == "stopped"
    failed = attempt(config, tmp_path / "run", plan)
    assert failed.exitcode == 3 and "step 7, 3 in a row" in failed.failure


def test_a_bad_loss_on_one_rank_is_left_out_on_both(text: Path, tmp_path: Path) -> None:
    """Rank 1's loss is NaN, rank 0 is killed before the checkpoint after it, and all is as if left out on purpose."""
    config, plan = policy(text, "skip", **TWO), Plan(poison=(BAD,))
    left_out = finished(attempt(config, tmp_path / "left-out", Plan(left_out=(BAD,)), workers=2))
    assert killed(attempt(config, tmp_path / "run", replace(plan, kill_at=BAD + 1), workers=2))
    skipped = finished(attempt(config, tmp_path / "run", plan, workers=2))
    assert_same_but_for_the_bad_step(skipped, left_out)
    assert counters(skipped) == {BAD + 1: 1}


def test_a_bad_loss_on_one_rank_ends_both(text: Path, tmp_path: Path) -> None:
    failed = attempt(policy(text, "raise", **TWO), tmp_path / "run", Plan(poison=(BAD,)), workers=2)
    assert failed.exitcode == 3 and failed.step == 6
    assert (tmp_path / "run" / "failure-1.txt").read_text() == failed.failure
