"""Exact continuation on the bare loop: wherever a run is stopped or killed, it ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainers import small_runs
from tests.trainers.crash import Ending, Plan, assert_same, attempt, finished, killed
from tests.trainers.data.hub_server import HubServer
from tests.trainers.small_runs import STEPS, config_for, stateful, streamed_mixture, worsening
from trainers.config import RunConfig


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(text: Path) -> RunConfig:
    return config_for(text)


@pytest.fixture(scope="module")
def two_phases(text: Path) -> RunConfig:
    return small_runs.two_phases(text)


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Ending:
    return finished(attempt(config, tmp_path_factory.mktemp("whole") / "run"))


@pytest.mark.parametrize("step", range(STEPS))
def test_stopping_is_invisible(config: RunConfig, whole: Ending, tmp_path: Path, step: int) -> None:
    """At every step: the first, mid-epoch, on an epoch's border, right before and after a checkpoint."""
    assert attempt(config, tmp_path / "run", Plan(stop_at=step)).state == "stopped"
    assert_same(finished(attempt(config, tmp_path / "run")), whole)


@pytest.mark.parametrize("step", range(0, STEPS, 2))
def test_being_killed_is_invisible(config: RunConfig, whole: Ending, tmp_path: Path, step: int) -> None:
    """Before the rows since the checkpoint are written, and, every other time, after."""
    assert killed(attempt(config, tmp_path / "run", Plan(kill_at=step, rows_arrived=step % 4 == 0)))
    assert_same(finished(attempt(config, tmp_path / "run")), whole)


def test_being_killed_three_times_and_stopped_once_is_invisible(
    config: RunConfig, whole: Ending, tmp_path: Path
) -> None:
    for plan in (Plan(kill_at=4, rows_arrived=True), Plan(kill_at=4), Plan(stop_at=7), Plan(kill_at=10)):
        attempt(config, tmp_path / "run", plan)
    assert_same(finished(attempt(config, tmp_path / "run")), whole)


@pytest.mark.parametrize("operation", [1, 2, 7, 12, 18, 25, 31, 40])
def test_being_killed_during_a_save_is_invisible(
    config: RunConfig, whole: Ending, tmp_path: Path, operation: int
) -> None:
    assert killed(attempt(config, tmp_path / "run", Plan(kill_in_save=operation)))
    assert_same(finished(attempt(config, tmp_path / "run")), whole)


@pytest.mark.parametrize("step", [5, 6, 7])
def test_stopping_around_the_border_of_two_phases_is_invisible(
    two_phases: RunConfig, tmp_path: Path, step: int
) -> None:
    whole = finished(attempt(two_phases, tmp_path / "whole"))
    attempt(two_phases, tmp_path / "run", Plan(stop_at=step))
    assert_same(finished(attempt(two_phases, tmp_path / "run")), whole)
    assert {row["phase"] for row in whole.rows} == {"first", "second"}


@pytest.mark.parametrize("plan", [Plan(stop_at=5), Plan(kill_at=8)])
def test_a_stateful_model_goes_on_in_the_middle_of_its_streams(text: Path, tmp_path: Path, plan: Plan) -> None:
    config = stateful(text)
    whole = finished(attempt(config, tmp_path / "whole", Plan(build="noisy_memory")))
    attempt(config, tmp_path / "run", Plan(plan.stop_at, plan.kill_at, build="noisy_memory"))
    assert_same(finished(attempt(config, tmp_path / "run", Plan(build="noisy_memory"))), whole)


@pytest.mark.parametrize("plan", [Plan(stop_at=5), Plan(kill_at=8)])
def test_a_streamed_mixture_goes_on_where_it_stood(local_hub: HubServer, tmp_path: Path, plan: Plan) -> None:
    config = streamed_mixture(local_hub, tmp_path)
    whole = finished(attempt(config, tmp_path / "whole"))
    attempt(config, tmp_path / "run", plan)
    assert_same(finished(attempt(config, tmp_path / "run")), whole)
    attempt(config, tmp_path / "crooked", plan)
    crooked = finished(attempt(config, tmp_path / "crooked", Plan(sabotage="stream_position")))
    assert crooked.digest != whole.digest


@pytest.mark.parametrize("piece", ["moments", "cursor"])
def test_withholding_a_piece_of_state_is_noticed(config: RunConfig, whole: Ending, tmp_path: Path, piece: str) -> None:
    """The negative control: without the piece, neither the bits nor the metrics agree."""
    attempt(config, tmp_path / "run", Plan(kill_at=8, rows_arrived=True))
    crooked = finished(attempt(config, tmp_path / "run", Plan(sabotage=piece)))
    assert crooked.digest != whole.digest
    assert any("resume/diverged" in row for row in crooked.rows)


@pytest.mark.parametrize("piece", ["rng", "stream_state"])
def test_withholding_state_of_a_stateful_model_is_noticed(text: Path, tmp_path: Path, piece: str) -> None:
    config = stateful(text)
    whole = finished(attempt(config, tmp_path / "whole", Plan(build="noisy_memory")))
    attempt(config, tmp_path / "run", Plan(stop_at=7, build="noisy_memory"))
    crooked = finished(attempt(config, tmp_path / "run", Plan(sabotage=piece, build="noisy_memory")))
    assert crooked.digest != whole.digest


def test_early_stopping_counts_on_after_a_restart(text: Path, tmp_path: Path) -> None:
    """A rate that only worsens the model: exactly `patience` evaluations after the best one, however interrupted."""
    config = worsening(text)
    whole = finished(attempt(config, tmp_path / "whole"))
    evaluations = [row["step"] for row in whole.rows if "val/loss" in row]
    losses = [row["val/loss"] for row in whole.rows if "val/loss" in row]
    assert evaluations[-1] < 60
    assert losses.index(min(losses)) == len(losses) - 1 - 3
    attempt(config, tmp_path / "run", Plan(kill_at=evaluations[-1] - 1))
    assert_same(finished(attempt(config, tmp_path / "run")), whole)
    attempt(config, tmp_path / "crooked", Plan(stop_at=evaluations[-1] - 1))
    crooked = finished(attempt(config, tmp_path / "crooked", Plan(sabotage="patience")))
    assert max(row["step"] for row in crooked.rows) > evaluations[-1]
