"""Laws of the memory plan: it adds up, what it says fits does and one row more does not, and it answers for any GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cards import CARDS, gpu_memory
from orchestrator.cli import main
from orchestrator.memory_plan import MemoryPlan, MemoryQuestion, Room, plan_memory, speed_of
from orchestrator.plan import flops_per_token
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.errors import UserError
from trainers.memory.calibration import USUAL, Sample, calibration_of, refine
from trainers.presets import PRESETS

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
SMALL = override(PRESETS["fundamentallm/small"](), ["model.vocab_size=4096", "batch.sequences=64"])


def planned(config: RunConfig, n_bytes: int, **more: Any) -> MemoryPlan:
    room = Room("cuda", n_bytes, "a test", USUAL["cuda"])
    return plan_memory(config, 100, room, **more)


def test_cards_are_known_by_name_and_amounts_by_unit() -> None:
    assert gpu_memory("24GiB") == (24 * GIB, "24GiB")
    assert gpu_memory("RTX 4090") == gpu_memory("rtx4090") == (CARDS["rtx4090"] << 20, "rtx4090")
    assert gpu_memory("NVIDIA H100")[1] == "h100"
    with pytest.raises(UserError, match="Did you mean h100"):
        gpu_memory("h10")
    with pytest.raises(UserError, match="unit"):
        gpu_memory("24")


def test_components_add_up_and_the_largest_batch_is_the_largest() -> None:
    plan = planned(SMALL, 1 * GIB, batches=(1, 8, 64))
    assert plan.cells[0].config == SMALL
    assert {(cell.precision, cell.recompute) for cell in plan.cells} >= {("fp32", False), ("bf16", True)}
    for cell in plan.cells:
        for _, parts in cell.shown:
            assert parts.total == sum(value for _, value in parts.parts()) == parts.tensors + parts.framework
        totals = [parts.total for _, parts in cell.shown]
        assert totals == sorted(totals)
        assert cell.footprint.peak_bytes(cell.largest) <= 1 * GIB < cell.footprint.peak_bytes(cell.largest + 1)
        assert cell.fitted is not None and cell.fitted.micro_sequences is not None
        assert 64 % cell.fitted.micro_sequences == 0
    assert any("int4" in cell for cell, _ in plan.left_out)
    tight = planned(SMALL, 100 << 20, variants=False).cells
    assert len(tight) == 1 and tight[0].largest == 0 and tight[0].fitted is None


def test_more_workers_show_every_stage_of_zero() -> None:
    cells = planned(override(SMALL, ["workers=4"]), 8 * GIB).cells
    plain = [cell for cell in cells if cell.precision == "fp32" and not cell.recompute]
    assert [cell.engine for cell in plain] == ["torch", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    states = [cell.footprint.state for cell in plain[1:]]
    held = [state.weights + state.gradients + state.optimizer for state in states]
    assert held == sorted(held, reverse=True) and held[3] < held[0] / 3


def test_time_follows_a_measured_speed(tmp_path: Path) -> None:
    room = Room("cuda", GIB, "a test", refine("h100", tmp_path, [Sample("x", 1, 2, 1e12, speed_of(SMALL))]))
    cell, *others = plan_memory(SMALL, 100, room).cells
    assert cell.tokens_per_s == pytest.approx(1e12 / flops_per_token(SMALL, cell.footprint.structure.values))
    assert all(other.tokens_per_s is None for other in others)
    assert calibration_of("h100", tmp_path).samples


@pytest.mark.parametrize("preset", ["codelm/xlarge", "genesis/deep_narrow_48"])
def test_large_presets_are_planned_in_little_memory(preset: str, tmp_path: Path) -> None:
    """In a process of its own, which tells how much memory it had."""
    code = (
        "import resource, sys\nfrom orchestrator.cli import main\n"
        f"code = main(['plan', {preset!r}, '--gpus', '1', '--gpu-memory', '24GiB', '--batch', '1,2', '--json',"
        f" '--runs-dir', {str(tmp_path)!r}])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) * 1024 < 2 * GIB
    found = json.loads(done.stdout)
    cells = found["memory"]["cells"]
    assert found["memory"]["limit_bytes"] == 24 * GIB and found["memory"]["device"] == "cuda"
    assert cells[0]["precision"] == "fp32" and {cell["precision"] for cell in cells} >= {"fp32", "bf16", "fp16", "int8"}
    first = cells[0]["batches"][0]
    assert first["weights"] >= 4 * found["parameters"] and first["total"] > 16 * found["parameters"] * 0.99
    assert found["plan"]["checkpoint_bytes"] == pytest.approx(12 * found["parameters"], rel=1e-3)
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_every_precision(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "genesis/microscope", "--table", "--gpu-memory", "rtx4090", "--runs-dir", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "genesis/microscope" in said and "184,871,040" in said and "bf16" in said and "rtx4090" in said
    assert main(["plan", "genesis/microscope", "--table", "--json", "--runs-dir", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["limit_bytes"] == 24 * GIB and len(found["presets"]["genesis/microscope"]) >= 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "2"], "--gpus needs --gpu-memory"),
        (["--gpus", "0", "--gpu-memory", "8GiB"], "at least 1"),
        (["--gpu-memory", "rtx409"], "rtx4090"),
        (["--batch", "1,x"], "--batch takes rows"),
        (["--batch", "0"], "at least 1"),
        (["--gpus", "3", "--gpu-memory", "8GiB"], "multiple of micro_sequences x workers"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "fundamentallm/tiny", *words]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert said in told and "Traceback" not in told


def test_a_question_is_checked() -> None:
    with pytest.raises(UserError):
        MemoryQuestion(gpus=1).check()
    MemoryQuestion(gpus=1, gpu_memory="8GiB").check()
