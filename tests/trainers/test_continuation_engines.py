"""Exact continuation of whole runs whose state lies in slices, and runs that change hands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainers.crash import Ending, Plan, assert_same, attempt, finished, killed
from tests.trainers.small_runs import STEPS, config_for, stateful, write_text
from trainers.config import RunConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TWO: dict[str, Any] = {"workers": 2, "batch": {"sequences": 4, "micro_sequences": 1}}
SLICED: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel": "fsdp"},
    "zero 3": {"engine": "deepspeed", "deepspeed": {"zero_stage": 3}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def sliced(text: Path, kind: str, **changes: Any) -> RunConfig:
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    return config_for(text, **TWO, **SLICED[kind], **changes)


@pytest.mark.parametrize("kind", SLICED)
def test_a_stop_and_a_killed_rank_are_invisible(text: Path, kind: str, tmp_path: Path) -> None:
    config = sliced(text, kind)
    whole = finished(attempt(config, tmp_path / "whole", workers=2))
    by_rank = [f"{file}-part-{rank:05d}" for file in ("model", "optimizer") for rank in range(2)]
    assert whole.stems == (*(by_rank if kind == "fsdp" else ("model", "optimizer")), "rank-00000", "rank-00001")
    assert attempt(config, tmp_path / "run", Plan(stop_at=5, rank=1), workers=2).step == 5
    assert killed(attempt(config, tmp_path / "run", Plan(kill_at=8, rank=0, rows_arrived=True), workers=2))
    assert_same(finished(attempt(config, tmp_path / "run", workers=2)), whole)


def losses(ending: Ending) -> list[float]:
    return [row["train/loss"] for row in ending.rows if "train/loss" in row]


@pytest.mark.parametrize("kind", SLICED)
def test_one_torch_process_goes_on_from_what_two_workers_saved_and_back(text: Path, kind: str, tmp_path: Path) -> None:
    plain = {"model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "context_length": 32, "dropout": 0.0}}
    two, one = sliced(text, kind, **plain), config_for(text, batch=TWO["batch"], **plain)
    whole = finished(attempt(one, tmp_path / "whole"))
    assert attempt(two, tmp_path / "run", Plan(stop_at=4), workers=2).step == 4
    assert attempt(one, tmp_path / "run", Plan(stop_at=8)).step == 8
    ended = finished(attempt(two, tmp_path / "run", workers=2))
    assert losses(ended) == pytest.approx(losses(whole), rel=1e-4) and len(losses(ended)) == STEPS
    assert ended.tensors != whole.tensors  # sums in another order: close, and not the same


def test_streams_keep_their_workers(text: Path, tmp_path: Path) -> None:
    two, one = stateful(text, **TWO), stateful(text, batch=TWO["batch"])
    attempt(two, tmp_path / "run", Plan(stop_at=5, build="noisy_memory"), workers=2)
    refused = attempt(one, tmp_path / "run", Plan(build="noisy_memory"))
    assert refused.exitcode == 1 and refused.state is None
