"""Laws of what memory takes out of a space: nothing too large is left, and what went is told with a number."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.sweeps.memory import Allowed, Footprints, is_ample, memory_cells, take_out
from search_spaces.catalog import lr_batch_precision
from search_spaces.domains import Choice, Float, Int
from search_spaces.space import Axis, Space
from search_spaces.trial import trial_config
from trainers.config import RunConfig
from trainers.config_io import dump_yaml, override
from trainers.errors import UserError
from trainers.presets import PRESETS

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


def wide(folder: Path, width: int = 512) -> RunConfig:
    """Large matrices, few tokens: optimizer state and snapshots decide."""
    text = folder / "text.txt"
    text.write_text(" ".join(random.Random(0).choice(["cat", "dog", "saw", "the"]) for _ in range(20_000)))
    return override(
        PRESETS["fundamentallm/tiny"](),
        [
            *(f"model.d_model={width}", "model.n_heads=8", "model.n_layers=8", "model.context_length=32"),
            *("batch.sequences=4", "budget.steps=3", "device=cpu", "evaluation.max_tokens=256", "model.dropout=0"),
            f'data.sources=[{{"corpus": "{text}"}}]',
        ],
    )


@pytest.fixture
def footprints(tmp_path: Path) -> Footprints:
    return Footprints(40, "cpu", tmp_path / "cache")


def peaks(base: RunConfig, space: Space, footprints: Footprints) -> dict[str, int]:
    return {json.dumps(point): footprints.of(config).peak_bytes(1) for point, config in memory_cells(base, space)}


def test_precisions_that_cannot_fit_are_taken_out_and_named(tmp_path: Path, footprints: Footprints) -> None:
    pytest.importorskip("bitsandbytes")
    base = wide(tmp_path)
    space = lr_batch_precision(base, "cpu").space
    found = peaks(base, space, footprints)
    fp32, int8 = (found[json.dumps({"precision": name})] for name in ("fp32", "int8"))
    assert int8 < fp32
    left = take_out(base, space, (int8 + fp32) // 2, footprints)
    assert [cell for cell, _ in left.taken_out if cell == "precision=fp32"]
    assert all("one row at a time needs" in reason for _, reason in left.taken_out)
    assert max(peaks(base, left.space, footprints).values()) <= (int8 + fp32) // 2
    assert Allowed.from_json(json.loads(json.dumps(left.to_json()))) == left
    assert take_out(base, space, fp32 * 2, footprints).taken_out == ()


def test_no_combination_that_is_left_is_too_large(tmp_path: Path, footprints: Footprints) -> None:
    base = wide(tmp_path)
    space = Space(
        (
            Axis("optim.lr", Float(1e-4, 1e-2, True)),
            Axis("model.n_layers", Choice((2, 8, 24))),
            Axis("model.d_model", Choice((128, 512))),
            Axis("batch.sequences", Choice((4, 64))),
        )
    )
    found = peaks(base, space, footprints)
    for limit in sorted(found.values())[:-1]:
        left = take_out(base, space, limit, footprints)
        shown = peaks(base, left.space, footprints)
        assert max(shown.values()) <= limit and left.taken_out
        assert set(shown) <= set(found)
    with pytest.raises(UserError, match="no point of the space"):
        take_out(base, space, min(found.values()) - 1, footprints)


def test_what_is_continuous_is_judged_at_its_ends(tmp_path: Path, footprints: Footprints) -> None:
    base = wide(tmp_path)
    space = Space((Axis("model.n_layers", Int(2, 24)),))
    cells = [config.model.n_layers for _, config in memory_cells(base, space)]
    assert cells == [2, 24]
    with pytest.raises(UserError):
        take_out(base, space, footprints.of(trial_config({"model.n_layers": 8}, base)).peak_bytes(1), footprints)


def test_one_micro_batch_fits_every_cell_that_is_left(tmp_path: Path, footprints: Footprints) -> None:
    base = override(wide(tmp_path, 128), ["model.context_length=256", "model.vocab_size=8192"])
    space = Space((Axis("batch.sequences", Choice((4, 256))), Axis("precision", Choice(("fp32", "bf16")))))
    left = take_out(base, space, 1 * GIB, footprints)
    assert left.taken_out == () and left.micro_limit is not None and 1 <= left.micro_limit < 256
    for _, config in memory_cells(base, left.space):
        largest = override(config, ["batch.sequences=256"])
        whole = RunConfig.model_validate(largest.model_dump() | {"batch": {"sequences": 256, "micro_sequences": 1}})
        peak = footprints.of(whole).peak_bytes(left.micro_limit, 256 // left.micro_limit)
        assert peak <= 1 * GIB
        assert footprints.of(largest).peak_bytes(256) > 1 * GIB
    assert take_out(base, space, 64 * GIB, footprints).micro_limit is None


def test_a_generous_guess_needs_no_prediction(tmp_path: Path, footprints: Footprints) -> None:
    base = wide(tmp_path)
    space = lr_batch_precision(base, "cpu").space
    assert is_ample(base, space, 40, 64 * GIB) and not is_ample(base, space, 40, GIB)
    most = max(peaks(base, space, footprints).values())
    for limit in (most, 2 * most, 4 * most):  # a guess may be too careful, never too bold
        assert not is_ample(base, space, 40, limit) or most <= limit


def test_only_what_a_new_maximum_shows_is_learnt(tmp_path: Path, footprints: Footprints) -> None:
    base = wide(tmp_path)
    for measured in (GIB, GIB - 1, GIB + 1):
        footprints.learn(base, measured)
    stored = json.loads((tmp_path / "cache/memory.json").read_text())
    assert [sample["measured_bytes"] for sample in stored["cpu"]["samples"]] == [GIB, GIB + 1]


# ---- a real sweep -------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_cell_that_cannot_fit_is_launched(tmp_path: Path) -> None:
    """`tune --space lr_batch_precision` under a limit: the grid has no trial of what went, and none dies of memory."""
    pytest.importorskip("bitsandbytes")
    base = wide(tmp_path)
    space = lr_batch_precision(base, "cpu").space
    found = peaks(base, space, Footprints(40, "cpu", tmp_path / "none"))
    limit = (found[json.dumps({"precision": "int8"})] + found[json.dumps({"precision": "fp32"})]) // 2
    limit = round(limit / 0.92)
    path = tmp_path / "wide.yaml"
    path.write_text(dump_yaml(base))
    command = ["tune", str(path), "--space", "lr_batch_precision", "--searcher", "random", "--scheduler", "none"]
    command += ["--trials", "3", "--evaluations", "1", "--memory-limit", f"{limit}B", "--name", "s", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *command, "--runs-dir", str(tmp_path / "runs")],
        capture_output=True, text=True, timeout=500, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stored = json.loads((tmp_path / "runs/s/sweep.json").read_text())
    gone = [cell for cell, _ in stored["memory"]["taken_out"]]
    assert "precision=fp32" in gone and "left out: precision=fp32" in done.stderr + done.stdout
    journal = [json.loads(line) for line in (tmp_path / "runs/s/sweep.jsonl").read_text().splitlines()]
    points = [event["params"] for event in journal if event.get("params")]
    assert len(points) == 3 and all(f"precision={point['precision']}" not in gone for point in points)
    outcomes = [json.loads(file.read_text()) for file in (tmp_path / "runs/s").glob("t*/outcome.json")]
    assert [outcome["state"] for outcome in outcomes] == ["finished"] * 3
