"""Laws of the bench: every cell is answered for, the one that runs out of memory too, and plans learn of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.bench import BenchQuestion
from orchestrator.cli import main
from tests.orchestrator.test_out_of_memory import hungry
from trainers.config_io import dump_yaml
from trainers.errors import UserError
from trainers.memory.calibration import calibration_of
from trainers.presets import PRESETS

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
