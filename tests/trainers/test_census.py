"""The census: what the tensors of a run really are, counted from the tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainers import small_runs
from tests.trainers.crash import attempt, finished
from tests.trainers.small_runs import config_for
from trainers.census import CENSUS
from trainers.config_io import override
from trainers.context import LocalContext, read_notes
from trainers.loop import train
from trainers.models import parameter_count

pytest.importorskip("bitsandbytes")

INT8 = ["precision.weights=int8", "precision.optimizer_state=int8"]
WIDE = ["model.d_model=256", "budget.steps=2"]  # matrices of 2^16 values and more: what is small beside them is small
RATIO = 0.27
WHOLE: dict[str, Any] = {}
"""by the name of a run, what it wrote into CENSUS"""


def first_step(folder: Path, name: str, words: list[str]) -> tuple[dict[str, Any], str]:
    """The metrics that the first step recorded, and what it told."""
    config = override(config_for(small_runs.write_text(folder)), [*WIDE, *words])
    context = LocalContext(folder / name)
    try:
        train(config, context)
    finally:
        context.close()
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    found = {key: value for row in rows if row["step"] == 1 for key, value in row.items() if key.startswith("dtypes/")}
    assert not any(key.startswith("dtypes/") for row in rows if row["step"] != 1 for key in row)
    whole = json.loads((folder / name / CENSUS).read_text())
    assert whole["bytes"]["optimizer"]["float32"] == found["dtypes/optimizer/float32_bytes"]
    WHOLE[name] = whole
    notes = [text for text, _ in read_notes(folder / name, 0) if text.startswith("after the first step")]
    assert len(notes) == 1
    return found, notes[0]


def total(census: dict[str, Any], part: str) -> float:
    return sum(value for key, value in census.items() if key.startswith(f"dtypes/{part}/") and key.endswith("_bytes"))


def test_8_bit_state_is_at_most_27_percent_of_32_bit_state(tmp_path: Path) -> None:
    plain, told_plain = first_step(tmp_path, "fp32", [])
    small, told = first_step(tmp_path, "int8", INT8)
    none, told_none = first_step(tmp_path, "none", [*INT8, "optim.min_8bit_size=100000000"])
    assert total(small, "optimizer") <= RATIO * total(plain, "optimizer")
    assert total(none, "optimizer") > 0.99 * total(plain, "optimizer")  # negative control: nothing was large enough
    assert total(small, "parameters") == total(plain, "parameters") == total(plain, "gradients")
    assert small["dtypes/optimizer/uint8_share"] > 0.9 and "dtypes/optimizer/uint8_bytes" not in plain
    assert "keep 32-bit state" in told and "norm" in told and "keep 32-bit state" not in told_plain
    assert "blocks.0.attention.qkv.weight" in told_none
    listed = WHOLE["none"]["without_8_bit_state"]  # the sentence names a few of them
    assert (
        len(listed) == WHOLE["none"]["tensors_with_state"]
        and f"and {len(listed) - 4} more, all in {CENSUS}" in told_none
    )
    assert 0 < len(WHOLE["int8"]["without_8_bit_state"]) < len(listed)
    assert not any(key.startswith("dtypes/masters") for key in plain)
    shares = [value for key, value in small.items() if key.startswith("dtypes/optimizer/") and key.endswith("_share")]
    assert sum(shares) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_zero_the_master_weights_and_the_gradients_are_told_too(tmp_path: Path, stage: int) -> None:
    """Two workers in bf16: fp32 master slices beside bf16 weights."""
    pytest.importorskip("deepspeed")
    zero = ["engine=deepspeed", f"deepspeed.zero_stage={stage}", "workers=2", "precision.compute=bf16"]
    config = override(config_for(small_runs.write_text(tmp_path), device="cpu"), [*WIDE, *zero])
    finished(attempt(config, tmp_path / "run", workers=2))
    found = json.loads((tmp_path / "run" / CENSUS).read_text())["bytes"]
    whole = parameter_count(config.model, 29) * 4
    assert found["masters"] == {"float32": pytest.approx(whole / 2, rel=0.05)}
    assert found["optimizer"]["float32"] == pytest.approx(whole, rel=0.05)
    assert found["parameters"] == {"bfloat16": pytest.approx(whole / (4 if stage == 3 else 2), rel=0.05)}
    assert sum(found["gradients"].values()) > 0


def test_bf16_weights_are_told_as_they_are(tmp_path: Path) -> None:
    found, told = first_step(tmp_path, "pure", ["precision.compute=bf16", "precision.bf16_weights=true"])
    assert found["dtypes/parameters/bfloat16_share"] == found["dtypes/gradients/bfloat16_share"] == 1.0
    assert "100.0% bfloat16" in told
    autocast, _ = first_step(tmp_path, "autocast", ["precision.compute=bf16"])
    assert autocast["dtypes/parameters/float32_share"] == 1.0
