"""Laws of running out of memory: it is told with numbers and a command that works, or the run goes on smaller."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.claimed import claimed
from orchestrator.cli import main
from orchestrator.experiment import Experiment, Request, settle, write_identity
from orchestrator.out_of_memory import accident_of, explain, shrunk
from trainers.config import RunConfig
from trainers.config_io import dump_yaml, override
from trainers.errors import ConfigError, UserError
from trainers.models import parameter_count
from trainers.presets import PRESETS
from trainers.record import series

ROOT = Path(__file__).parents[2]
ROWS, STEPS = 96, 3
LIMIT = "700MiB"  # 96 rows of 128 logits over 8,192 tokens take 0.4 GiB three times; half of them leave room
OUTCOME = {"state": "failed", "reason": "out_of_memory: can't allocate memory", "step": 2}


def hungry(folder: Path) -> RunConfig:
    """A tiny model with a large vocabulary: its logits decide."""
    text = folder / "text.txt"
    text.write_text(" ".join(random.Random(0).choice(["cat", "dog", "saw", "the"]) for _ in range(30_000)))
    return override(
        PRESETS["fundamentallm/tiny"](),
        [
            *("model.d_model=16", "model.n_layers=1", "model.context_length=128", "model.vocab_size=8192"),
            *("schedule.kind=constant", "model.dropout=0", f"batch.sequences={ROWS}", f"budget.steps={STEPS}"),
            *("evaluation.every_steps=null", "evaluation.max_tokens=512", "samples.count=0", "device=cpu"),
            *("logging.every_steps=1", "schedule.warmup_steps=0"),
            *("checkpoint.every_steps=1", "checkpoint.every_minutes=null"),
            f'data.sources=[{{"corpus": "{text}"}}]',
        ],
    )


def experiment_of(config: RunConfig) -> Experiment:
    return Experiment("hungry", Path("/nowhere"), config, "f", {}, True, False)


# ---- what is decided -----------------------------------------------------------------------------------------


def test_half_the_rows_and_twice_the_micro_batches(tmp_path: Path) -> None:
    config = hungry(tmp_path)
    sizes = []
    while (smaller := shrunk(config)) is not None:
        assert smaller.sequences_per_step == ROWS and smaller.accumulation >= 2 * config.accumulation
        assert smaller.micro_sequences <= config.micro_sequences // 2
        sizes.append(smaller.micro_sequences)
        config = smaller
    assert sizes == [48, 24, 12, 6, 3, 1]


def test_only_an_accident_of_memory_is_one() -> None:
    assert accident_of(OUTCOME) == "can't allocate memory"
    for other in (None, {"state": "stopped", "reason": "out_of_memory: x"}, {"state": "failed", "reason": "error: x"}):
        assert accident_of(other) is None


def test_it_is_explained_with_the_plans_numbers_and_the_next_command(tmp_path: Path) -> None:
    config = hungry(tmp_path)
    request = Request(tmp_path, memory_limit=700 << 20)
    told = explain(experiment_of(config), request, 30, "cpu", OUTCOME)
    assert "96 rows" in told and "step 2" in told and "logits 1.1 GiB" in told and "700.0 MiB" in told
    found = re.search(r"orchestrate train hungry --runs-dir (\S+) --memory-limit 734003200B (\S+)", told)
    assert found is not None and Path(found[1]) == tmp_path
    micro = override(config, [found[2]]).micro_sequences
    assert ROWS % micro == 0 and micro < ROWS
    assert "--on-oom shrink" in told


def test_where_not_even_one_row_fits_the_plan_that_is_named_is_the_runs_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is asked of the run, whose preset knows nothing of its settings, or is none."""
    config = override(hungry(tmp_path), ["batch.sequences=1", "preset=custom"])
    request = Request(tmp_path / "runs", name="hungry", memory_limit=700 << 20)
    request.runs_dir.mkdir()
    begun = settle(config, request, ("hash",))
    begun.run_dir.mkdir()
    write_identity(begun)
    told = explain(begun, request, 30, "cpu", OUTCOME)
    assert "activation_checkpointing" in told
    found = re.search(r"`orchestrate (plan .*)`", told)
    assert found is not None, told
    assert main([*shlex.split(found[1]), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    vocabulary = planned["vocab_size"]
    assert planned["parameters"] == parameter_count(config.model, vocabulary)
    assert planned["parameters"] != parameter_count(PRESETS["fundamentallm/tiny"]().model, vocabulary)
    assert len(planned["memory"]["cells"]) > 2 and planned["memory"]["cells"][0]["batches"][0]["micro_sequences"] == 1
    assert main(["plan", config.preset, "--variants"]) == 2  # what was named before


def test_a_run_may_go_on_in_smaller_pieces_and_in_no_other_way(tmp_path: Path) -> None:
    config, request = hungry(tmp_path), Request(tmp_path, name="hungry")
    begun = settle(config, request, ("hash",))
    begun.run_dir.mkdir()
    write_identity(begun)
    pieces = settle(override(config, ["batch.micro_sequences=8"]), request, ("hash",))
    assert pieces.known and not pieces.extended and pieces.config.accumulation == 12
    with claimed(pieces):
        write_identity(pieces)
    with pytest.raises(UserError, match="another configuration"), claimed(begun):
        pass
    assert settle(override(config, ["batch.micro_sequences=8", "budget.steps=9"]), request, ("hash",)).extended
    for change in ("batch.sequences=48", "optim.lr=1"):
        with pytest.raises(ConfigError, match="another configuration"):
            settle(override(config, ["batch.micro_sequences=8", change]), request, ("hash",))


# ---- inside a worker --------------------------------------------------------------------------------------------


def worked(folder: Path, monkeypatch: pytest.MonkeyPatch, train: Any, **changes: Any) -> dict[str, Any] | None:
    """How a worker of one rank ended whose training is `train`; None: it said nothing."""
    import trainers.loop
    from orchestrator.worker import attempt
    from trainers.context import LocalContext

    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(trainers.loop, "train", train)
    job = {"config": hungry(folder).model_dump(mode="json"), "threads": 1, "tracking": {}, **changes}
    attempt(job, lambda: LocalContext(folder / "run"))
    return stored(folder / "run") if (folder / "run" / "outcome.json").exists() else None


def test_memory_that_python_refuses_without_a_word_is_an_accident_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MemoryError) as refused:
        bytearray(1 << 62)
    assert str(refused.value) == ""  # it says nothing, so its kind has to do
    ended = worked(tmp_path, monkeypatch, lambda config, context: bytearray(1 << 62))
    assert accident_of(ended) == "MemoryError"


def test_a_run_on_the_cpu_is_held_to_memory_of_the_cpu_beside_a_gpu_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    import torch

    def limits(*_: Any) -> None:
        seen.append(resource.getrlimit(resource.RLIMIT_AS)[0])

    seen: list[int] = []
    outside = resource.getrlimit(resource.RLIMIT_AS)[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    worked(tmp_path / "free", monkeypatch, limits)
    worked(tmp_path / "held", monkeypatch, limits, memory_limit=64 << 30)
    assert seen[0] == outside and 64 << 30 < seen[1] != outside  # the negative control first: no limit
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == outside


# ---- with real workers against a real limit ------------------------------------------------------------------------


def orchestrate(*words: str, code: int) -> str:
    """What the command said, having ended with `code`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *words], capture_output=True, text=True, env=environment, timeout=280
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    return said


def losses(run_dir: Path) -> dict[int, float]:
    return dict(series(run_dir / "metrics.jsonl", "train/loss"))


def stored(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "outcome.json").read_text())
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_against_a_limit_it_stops_with_a_command_that_works_or_shrinks(tmp_path: Path) -> None:
    """The same losses as without a limit, to the rounding of sums; the command that was told really goes on."""
    path = tmp_path / "hungry.yaml"
    path.write_text(dump_yaml(hungry(tmp_path)))
    place = ("--runs-dir", str(tmp_path / "runs"))
    orchestrate("train", str(path), "--name", "free", *place, code=0)
    free = losses(tmp_path / "runs/free")
    assert sorted(free) == [1, 2, 3]

    told = orchestrate("train", str(path), "--name", "held", "--memory-limit", LIMIT, *place, code=3)
    assert "ran out of memory" in told and "The plan for it" in told
    assert stored(tmp_path / "runs/held")["reason"].startswith("out_of_memory")
    found = re.search(r"orchestrate (train held .*batch\.micro_sequences=\d+)", told)
    assert found is not None, told
    orchestrate(*shlex.split(found[1]), code=0)
    assert losses(tmp_path / "runs/held") == pytest.approx(free, rel=1e-5)

    said = orchestrate(
        "train", str(path), "--name", "smaller", "--memory-limit", LIMIT, "--on-oom", "shrink", *place, code=0
    )
    assert "out of memory at 96 rows at a time" in said
    assert stored(tmp_path / "runs/smaller")["state"] == "finished"
    assert losses(tmp_path / "runs/smaller") == pytest.approx(free, rel=1e-5)
    assert losses(tmp_path / "runs/smaller") != free, "the sums are the same: it did not accumulate"
