"""Exact continuation with two ranks: whichever of them is stopped or killed, the run ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainers import small_runs
from tests.trainers.crash import Ending, Plan, assert_same, finished, killed
from tests.trainers.crash import attempt as attempt_with
from tests.trainers.data.hub_server import HubServer
from tests.trainers.small_runs import config_for, stateful, streamed_mixture, worsening
from trainers.config import RunConfig

TWO = {"workers": 2, "batch": {"sequences": 4, "micro_sequences": 1}}  # two micro-batches a step on each rank


def attempt(config: RunConfig, run_dir: Path, plan: Plan = Plan()) -> Ending:
    return attempt_with(config, run_dir, plan, workers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(text: Path) -> RunConfig:
    return config_for(text, **TWO)


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Ending:
    return finished(attempt(config, tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def memory(text: Path) -> RunConfig:
    """For NoisyMemory, whose ranks each draw noise from NumPy's generator."""
    return stateful(text, **TWO)


@pytest.fixture(scope="module")
def whole_memory(memory: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Ending:
    return finished(attempt(memory, tmp_path_factory.mktemp("memory") / "run", Plan(build="noisy_memory")))


def test_both_ranks_stand_in_the_checkpoint(whole: Ending) -> None:
    assert whole.stems == ("model", "optimizer", "rank-00000", "rank-00001")


@pytest.mark.parametrize("plan", [Plan(stop_at=5, rank=1), Plan(stop_at=8, rank=0)], ids=["mid-epoch", "border"])
def test_stopping_is_invisible(config: RunConfig, whole: Ending, tmp_path: Path, plan: Plan) -> None:
    """One rank is asked; both stop before the same step."""
    stopped = attempt(config, tmp_path / "run", plan)
    assert (stopped.state, stopped.reason, stopped.step) == ("stopped", "test", plan.stop_at)
    assert_same(finished(attempt(config, tmp_path / "run")), whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_alone_heard_that_the_run_is_given_up_tells_the_others(
    config: RunConfig, tmp_path: Path, rank: int
) -> None:
    """Else one saves before it ends, and waits for the part of the other, which does not."""
    stopped = attempt(config, tmp_path / "run", Plan(stop_at=8, stop_reason="asha", rank=rank))
    assert (stopped.state, stopped.reason) == ("stopped", "asha")
    assert stopped.step == 6


@pytest.mark.parametrize(
    "plan", [Plan(kill_at=7, rank=1), Plan(kill_at=8, rank=0, rows_arrived=True)], ids=["rank 1", "rank 0"]
)
def test_a_killed_rank_is_invisible(config: RunConfig, whole: Ending, tmp_path: Path, plan: Plan) -> None:
    assert killed(attempt(config, tmp_path / "run", plan))
    assert_same(finished(attempt(config, tmp_path / "run")), whole)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(kill_in_save=22, rank=0),
        Plan(kill_in_save=66, rank=0),
        Plan(kill_in_save=4, rank=1),
        Plan(kill_in_save=15, rank=1),
    ],
    ids=["rank 0", "rank 0, all parts written", "rank 1", "rank 1, second save"],
)
def test_a_rank_killed_during_a_save_is_invisible(config: RunConfig, whole: Ending, tmp_path: Path, plan: Plan) -> None:
    """What either rank left in the staging directory is neither read nor in the way."""
    assert killed(attempt(config, tmp_path / "run", plan))
    assert list((tmp_path / "run" / "checkpoints").glob(".tmp-step-*"))
    assert_same(finished(attempt(config, tmp_path / "run")), whole)
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


def test_the_border_of_two_phases_is_invisible(text: Path, tmp_path: Path) -> None:
    config = small_runs.two_phases(text, **TWO)
    whole = finished(attempt(config, tmp_path / "whole"))
    for plan in (Plan(kill_at=6, rank=1), Plan(stop_at=6), Plan(stop_at=7, rank=1)):
        attempt(config, tmp_path / "run", plan)
    assert_same(finished(attempt(config, tmp_path / "run")), whole)


def test_a_streamed_mixture_goes_on_where_it_stood(local_hub: HubServer, tmp_path: Path) -> None:
    config = streamed_mixture(local_hub, tmp_path, **TWO)
    whole = finished(attempt(config, tmp_path / "whole"))
    for plan in (Plan(stop_at=5), Plan(kill_at=8, rank=1)):
        attempt(config, tmp_path / "run", plan)
    assert_same(finished(attempt(config, tmp_path / "run")), whole)


def test_a_stateful_model_goes_on_in_the_middle_of_its_streams(
    memory: RunConfig, whole_memory: Ending, tmp_path: Path
) -> None:
    for plan in (Plan(stop_at=5, build="noisy_memory"), Plan(kill_at=8, rank=1, build="noisy_memory")):
        attempt(memory, tmp_path / "run", plan)
    assert_same(finished(attempt(memory, tmp_path / "run", Plan(build="noisy_memory"))), whole_memory)


def test_early_stopping_counts_on_after_a_restart(text: Path, tmp_path: Path) -> None:
    config = worsening(text, **TWO)
    whole = finished(attempt(config, tmp_path / "whole"))
    assert (whole.reason, whole.step) == ("early_stopping", max(row["step"] for row in whole.rows))
    assert whole.step is not None and whole.step < 60
    assert killed(attempt(config, tmp_path / "run", Plan(kill_at=whole.step - 1, rank=1)))
    assert_same(finished(attempt(config, tmp_path / "run")), whole)


@pytest.mark.parametrize("piece", ["moments", "cursor"])
def test_withholding_a_piece_from_one_rank_is_noticed(
    config: RunConfig, whole: Ending, tmp_path: Path, piece: str
) -> None:
    """The negative control: rank 1 alone lacks the piece, and neither the bits nor the metrics agree."""
    assert killed(attempt(config, tmp_path / "run", Plan(kill_at=8, rank=0, rows_arrived=True)))
    crooked = finished(attempt(config, tmp_path / "run", Plan(sabotage=piece, rank=1)))
    assert crooked.tensors != whole.tensors
    assert any("resume/diverged" in row for row in crooked.rows)


@pytest.mark.parametrize("piece", ["rng", "stream_state"])
def test_withholding_state_of_one_rank_of_a_stateful_model_is_noticed(
    memory: RunConfig, whole_memory: Ending, tmp_path: Path, piece: str
) -> None:
    attempt(memory, tmp_path / "run", Plan(stop_at=7, build="noisy_memory"))
    crooked = finished(attempt(memory, tmp_path / "run", Plan(sabotage=piece, rank=1, build="noisy_memory")))
    assert crooked.tensors != whole_memory.tensors
