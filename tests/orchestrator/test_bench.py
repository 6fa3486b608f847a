"""Laws of the bench: every cell is answered for, the one that runs out of memory too, and plans learn of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.bench import BenchCell, BenchQuestion
from orchestrator.cli import main
from tests.orchestrator.test_out_of_memory import hungry
from trainers.batch_probe import Probe
from trainers.config_io import dump_yaml
from trainers.errors import UserError
from trainers.memory.calibration import USUAL, calibration_of, refine
from trainers.presets import PRESETS

GIB = 1 << 30
TINY = PRESETS["fundamentallm/tiny"]()


def test_a_question_names_every_combination() -> None:
    question = BenchQuestion((4, 8), ("fp32", "bf16"), "both", "yes")
    cells = list(question.configs(TINY))
    assert [(way, rows) for way, rows, _ in cells[:3]] == [
        ("fp32 recompute", 4), ("fp32 recompute", 8), ("fp32 recompute compiled", 4),
    ]  # fmt: skip
    assert len(cells) == 8
    for _, rows, config in cells:
        assert not isinstance(config, str)
        assert (config.micro_sequences, config.accumulation, config.workers) == (rows, 1, 1)
    [(way, rows, config)] = BenchQuestion().configs(TINY)
    assert (way, rows) == ("fp32", TINY.micro_sequences)
    (refused,) = (cell for _, _, cell in BenchQuestion((4,), ("int4",)).configs(TINY))
    assert isinstance(refused, str) and "init-from" in refused
    for wrong in (BenchQuestion((0,)), BenchQuestion(precisions=("fp64",)), BenchQuestion(steps=0)):
        with pytest.raises(UserError):
            wrong.check()


def measured(compiled: bool, reserved: int | None, peak: int = 3 * GIB) -> BenchCell:
    probe = Probe(8, "ok", tokens_per_s=1e3, step_ms=1.0, peak_bytes=peak, reserved_bytes=reserved, limit_bytes=8 * GIB)
    return BenchCell("bf16", 8, probe, 3 * GIB, 2 * GIB, 10**6, "bf16 compiled" if compiled else "bf16", compiled)


def test_a_compiled_cell_teaches_its_speed_and_not_its_memory(tmp_path: Path) -> None:
    eager, compiled = measured(False, None).sample(), measured(True, None).sample()
    assert eager is not None and compiled is not None
    assert eager.measured_bytes == 3 * GIB and compiled.measured_bytes is None
    assert eager.flops_per_s == compiled.flops_per_s == 1e9
    known = refine("cpu", tmp_path, [compiled] * 5)
    assert known.constant_bytes == USUAL["cpu"].constant_bytes and known.speed("bf16 compiled") == 1e9
    assert refine("cpu", tmp_path, [eager] * 3).constant_bytes != USUAL["cpu"].constant_bytes


def test_on_a_gpu_what_the_allocator_held_is_what_counts() -> None:
    """Unused blocks are taken from the card too; on a CPU it is the process."""
    gpu, cpu = measured(False, reserved=4 * GIB), measured(False, reserved=None)
    assert gpu.measured_bytes == 4 * GIB and gpu.headroom_bytes == 4 * GIB
    assert cpu.measured_bytes == 3 * GIB and cpu.headroom_bytes == 5 * GIB
    taught = gpu.sample()
    assert taught is not None and taught.measured_bytes == 4 * GIB
    lost = replace(gpu, probe=replace(gpu.probe, fate="out of memory"))
    assert lost.sample() is None and lost.measured_bytes is None and lost.headroom_bytes is None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cell_that_runs_out_of_memory_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_store_named: None
) -> None:
    path, runs = tmp_path / "hungry.yaml", tmp_path / "runs"
    path.write_text(dump_yaml(hungry(tmp_path)))
    words = ["bench", str(path), "--batch", "4,96", "--steps", "1", "--memory-limit", "700MiB", "--json"]
    assert main([*words, "--runs-dir", str(runs)]) == 0
    found = json.loads(capsys.readouterr().out)
    small, large = found["cells"]
    assert small["fate"] == "ok" and small["tokens_per_s"] > 0 and small["model_flops_utilisation"] > 0
    assert small["headroom_bytes"] == small["limit_bytes"] - small["peak_bytes"]
    assert small["predicted_bytes"] == pytest.approx(small["peak_bytes"], rel=0.35)  # before any calibration
    assert large["fate"] in ("out of memory", "killed") and large["tokens_per_s"] is None
    folder = Path(found["folder"])
    assert (folder / "bench.png").stat().st_size > 10_000
    page = (folder / "bench.md").read_text()
    assert page.count("\n| ") == 3 and "out of memory" in page
    assert found["mlflow_run_id"]
    learnt = calibration_of("cpu", runs / ".cache")
    assert len(learnt.samples) == 1 and learnt.speed("fp32") is not None
