"""A run changes hands: begun by two Ray Train workers under ZeRO-3, ended by one under torch."""

from __future__ import annotations

import pytest

from orchestrator.tracking import open_store
from tests.orchestrator.faults import Place
from trainers.identity import read_identity
from trainers.record import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


def losses(place: Place, name: str) -> dict[int, float]:
    rows = [row for row, _ in read_rows(place.runs / name / "metrics.jsonl")]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def test_a_run_goes_on_under_another_engine_and_with_fewer_workers(place: Place) -> None:
    pytest.importorskip("deepspeed")
    common = ["model.dropout=0", "evaluation.every_steps=10", "checkpoint.every_steps=10", "precision.compute=fp32"]
    zero = ["engine=deepspeed", "deepspeed.zero_stage=3", "--workers", "2"]
    first = place.run("handed-over", *common, *zero, "budget.steps=20")
    assert first.exitcode == 0, first.output
    refused = place.run("handed-over", *common, "budget.steps=40")
    assert refused.exitcode == 2 and "--reshape" in refused.output and "workers: 2 -> 1" in refused.output
    second = place.run("handed-over", *common, "budget.steps=40", "--reshape")
    assert second.exitcode == 0, second.output
    said = " ".join(second.output.split())  # lines are folded
    assert "deepspeed, ZeRO 3 and is now torch" in said and "world_size was 2 and is now 1" in said
    alone = place.run("torch-alone", *common, "budget.steps=40")
    assert alone.exitcode == 0, alone.output

    want, got = losses(place, "torch-alone"), losses(place, "handed-over")
    assert got == pytest.approx(want, rel=1e-4) and len(got) == 40
    assert [got[step] for step in range(2, 41)] != pytest.approx([want[step] for step in range(1, 40)], rel=1e-4)
    identity = read_identity(place.runs / "handed-over") or {}
    assert open_store(place.runs).client.get_run(identity["mlflow_run_id"]).info.status == "FINISHED"


def test_what_cannot_be_is_said_before_anything_starts(place: Place) -> None:
    for settings, told in {
        ("engine=deepspeed", "deepspeed.zero_stage=3", "compile=true"): "compile=true with deepspeed.zero_stage=3",
        ("engine=deepspeed", "deepspeed.config=/nowhere.json"): "deepspeed.config=/nowhere.json: cannot be read",
        ("deepspeed.zero_stage=3",): "would do nothing under engine=torch",
    }.items():
        refused = place.run("refused", *settings)
        assert refused.exitcode == 2 and told in " ".join(refused.output.split())
        assert not (place.runs / "refused").exists()
