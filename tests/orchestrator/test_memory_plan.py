"""Laws of the memory plan: it adds up, what it says fits does and one row more does not, and it answers for any GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cards import CARDS, gpu_memory
from orchestrator.cli import main
from orchestrator.memory_plan import (
    MemoryPlan,
    MemoryQuestion,
    PlannedCell,
    Room,
    explained,
    plan_memory,
    speed_of,
    timeline_key,
)
from orchestrator.memory_tables import memory_notes
from orchestrator.plan import flops_per_token
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.errors import UserError
from trainers.memory.calibration import USUAL, Sample, calibration_of, refine
from trainers.memory.prediction import Footprint, read_footprint, timeline_of
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
    assert [cell.engine for cell in plain] == ["torch", "torch", "FSDP2", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    assert [cell.config.compile for cell in plain] == [False, True] + 5 * [False]  # nothing else compiles
    held = {cell.engine: held_in_training(cell) for cell in plain}
    assert held["ZeRO-0"] == held["torch"] > held["ZeRO-1"] > held["ZeRO-2"] > held["ZeRO-3"]
    assert held["FSDP2"] < held["torch"] / 3 < 2 * held["ZeRO-3"]


def held_in_training(cell: PlannedCell) -> int:
    """Weights, gradients and optimizer state of one worker."""
    (phase,) = cell.footprint.phases
    return phase.state.weights + phase.state.gradients + phase.state.optimizer


def test_what_lies_in_slices_is_made_whole_for_an_evaluation() -> None:
    """FSDP2 and ZeRO-3 gather all weights on each worker; the other stages have them."""
    base = override(SMALL, ["workers=4", "model.d_model=512", "model.n_layers=24", "evaluation.max_tokens=256"])
    heavy = {cell.engine: cell.footprint for cell in planned(base, 8 * GIB).cells if cell.precision == "fp32"}
    whole = 4 * heavy["torch"].structure.values
    for engine, shares in (("FSDP2", 16), ("ZeRO-3", 20)):
        evaluation = heavy[engine].phases[0]._scoring()
        assert evaluation.weights >= whole / 4 and evaluation.working >= whole
        assert evaluation.total < whole * (shares / 4 / 4 + 1 + 0.5)
        assert heavy[engine].phases[0]._gathered_in_training < 0.2 * whole  # two layers and the embeddings
    assert heavy["ZeRO-2"].phases[0]._scoring().working < 0.1 * whole


def test_fsdp_adds_up_whole_gradients_until_it_sends_them() -> None:
    cells = planned(override(SMALL, ["workers=4", "parallel=fsdp"]), 8 * GIB, variants=False).cells
    (footprint,) = (cell.footprint for cell in cells)
    whole = 4 * footprint.structure.values
    (phase,) = footprint.phases
    assert phase._training(16, 1).gradients == pytest.approx(whole / 4, rel=0.01)
    assert phase._training(1, 16).gradients == pytest.approx(whole, rel=0.01)
    (alone,) = planned(SMALL, 8 * GIB, variants=False).cells[0].footprint.phases
    assert phase._standing.snapshot == math.ceil(alone._standing.snapshot / 4)  # each saves its slices
    zero = planned(override(SMALL, ["workers=4", "engine=deepspeed"]), 8 * GIB, variants=False).cells[0].footprint
    assert zero.phases[0]._training(1, 16).gradients == pytest.approx(whole / 4, rel=0.01)


def test_every_way_is_compiled_too_and_says_how_it_is_counted() -> None:
    plan = planned(SMALL, 8 * GIB)
    ways = [(cell.precision, cell.recompute, cell.config.compile) for cell in plan.cells]
    assert len(ways) == len(set(ways)) and {("bf16", True, True), ("fp32", False, False)} < set(ways)
    taken = {way: cell.footprint.peak_bytes(8) for way, cell in zip(ways, plan.cells, strict=True)}
    assert all(taken[precision, again, not comp] == value for (precision, again, comp), value in taken.items())
    assert any("compiled model is counted as an eager one" in note for note in memory_notes(plan))
    assert not any("compiled" in note for note in memory_notes(planned(SMALL, GIB, variants=False)))


def test_four_bit_gradients_are_those_of_the_adapters() -> None:
    """They are not planned with the timeline of bf16, whose products have the same shapes."""
    cells = planned(override(SMALL, ["init_from=base"]), 8 * GIB).cells
    parts = {cell.precision: cell.footprint.phases[0]._training(4, 2) for cell in cells if not cell.recompute}
    assert parts["bf16"].gradients == pytest.approx(parts["fp32"].gradients)
    assert 0 < parts["int4"].gradients < parts["bf16"].gradients / 10
    assert 0 < parts["int4"].activations != parts["bf16"].activations
    half, quarter = (override(SMALL, ["init_from=base", f"precision.adapter_rank={rank}"]) for rank in (8, 4))
    assert timeline_key(half) != timeline_key(quarter) != timeline_key(SMALL)


def test_a_timeline_serves_every_depth_and_no_other_shape() -> None:
    deep, deeper = (override(SMALL, [f"model.n_layers={layers}"]) for layers in (4, 9))
    assert timeline_key(deep) == timeline_key(deeper)
    for other in ("model.n_layers=2", "model.d_model=192", "model.dropout=0.2", "precision.compute=bf16"):
        assert timeline_key(override(deep, [other])) != timeline_key(deep)
    shared = timeline_of(deep, 100, "cuda")
    alone = read_footprint(deeper, 100, "cuda", USUAL["cuda"])
    assert read_footprint(deeper, 100, "cuda", USUAL["cuda"], timeline=shared).at(3, 2) == alone.at(3, 2)


def test_the_hungriest_phase_decides_whatever_makes_it_hungry() -> None:
    """Optimizer state, or activations; and which it is may depend on the rows."""

    def footprint(*phases: str) -> Footprint:
        settings = [f"phases=[{', '.join(phases)}]"] if phases else []
        return read_footprint(override(SMALL, settings), 100, "cuda", USUAL["cuda"])

    sgd = '{"name": "a", "optim": {"name": "sgd", "momentum": 0.0}}'
    adamw = '{"name": "b", "optim": {"name": "adamw"}, "model": {"activation_checkpointing": true}}'
    both, swapped, first, second = (footprint(*each) for each in ([sgd, adamw], [adamw, sgd], [sgd], [adamw]))
    for rows in (1, 4, 64):
        assert both.at(rows, 1) == swapped.at(rows, 1)
        assert both.peak_bytes(rows, 1) == max(first.peak_bytes(rows, 1), second.peak_bytes(rows, 1))
    assert both.at(1, 1) == second.at(1, 1) != first.at(1, 1)
    assert both.at(64, 1) == first.at(64, 1)
    assert both.checkpoint_bytes == second.checkpoint_bytes > first.checkpoint_bytes
    assert len(footprint(sgd, sgd.replace('"a"', '"c"')).phases) == 1  # alike, they are one


def test_it_fits_is_said_of_the_configured_batch() -> None:
    """Whatever other micro-batches are shown beside it."""
    taken = planned(SMALL, GIB, variants=False).cells[0].footprint
    limit = (taken.peak_bytes(1) + taken.peak_bytes(64)) // 2
    one, configured = taken.peak_bytes(1), taken.peak_bytes(64)
    assert one < limit < configured and SMALL.micro_sequences == 64
    told = explained(planned(SMALL, limit, variants=False, batches=(1, 2)).cells[0])
    assert "it fits" not in told and "64 rows at a time" in told and "batch.micro_sequences=" in told
    roomy = explained(planned(SMALL, 2 * configured, variants=False, batches=(1, 2)).cells[0])
    assert "64 rows at a time" in roomy and "it fits" in roomy
    assert "not even one row" in explained(planned(SMALL, 100 << 20, variants=False, batches=(1,)).cells[0])


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
