"""Laws of what memory takes out of a space: nothing too large is left, and what went is told with a number."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import memory_limit
from orchestrator.memory_limit import CONTEXT_BYTES, part_of_gpu
from orchestrator.signals import StopSignals
from orchestrator.sweeps import memory_cells as cells_of_memory
from orchestrator.sweeps.driver import SweepDriver
from orchestrator.sweeps.memory import Allowed, Footprints, allowed, is_ample, take_out
from orchestrator.sweeps.memory_cells import memory_cells
from orchestrator.sweeps.settings import SweepSettings
from orchestrator.sweeps.slots import Slots
from orchestrator.sweeps.sweep import Sweep, SweepRequest
from search_spaces.catalog import lr_batch_precision
from search_spaces.domains import Choice, Float, Int
from search_spaces.space import Axis, Space, When
from search_spaces.trial import trial_config
from tests.orchestrator.faults import seconds_until_gone
from tests.orchestrator.sweep_episodes import RANDOM, SweepPlace, assert_sweep_told
from trainers.claim import Claim
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
    cells = memory_cells(base, space, footprints.vocab_size).judged
    return {json.dumps(point): footprints.of(config).peak_bytes(1) for point, config in cells}


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
    cells = [config.model.n_layers for _, config in memory_cells(base, space, 40).judged]
    assert cells == [24, 2]  # the largest first
    with pytest.raises(UserError):
        take_out(base, space, footprints.of(trial_config({"model.n_layers": 8}, base)).peak_bytes(1), footprints)


def test_one_micro_batch_fits_every_cell_that_is_left(tmp_path: Path, footprints: Footprints) -> None:
    base = override(wide(tmp_path, 128), ["model.context_length=256", "model.vocab_size=8192"])
    space = Space((Axis("batch.sequences", Choice((4, 256))), Axis("precision", Choice(("fp32", "bf16")))))
    left = take_out(base, space, 1 * GIB, footprints)
    assert left.taken_out == () and left.micro_limit is not None and 1 <= left.micro_limit < 256
    for _, config in memory_cells(base, left.space, 40).judged:
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


def test_of_too_many_cells_the_largest_are_judged(
    tmp_path: Path, footprints: Footprints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit goes wherever it stands in the space, and what was not looked at is said."""
    base = wide(tmp_path)
    depths, widths = Choice((2, 8, 24)), Choice((512, 128, 256))
    space = Space((Axis("model.n_layers", depths), Axis("model.d_model", widths), Axis("optim.lr", Choice((1e-3,)))))
    found = peaks(base, space, footprints)
    assert len(found) == 9
    limit = sorted(found.values())[3]
    monkeypatch.setattr(cells_of_memory, "MOST_CELLS", 2)
    few = memory_cells(base, space, 40)
    assert {json.dumps(point) for point, _ in few.judged} == set(sorted(found, key=lambda cell: -found[cell])[:2])
    assert few.unjudged == 7
    left = take_out(base, space, limit, footprints)
    assert left.unjudged == len(depths_and_widths(left.space)) - 2
    monkeypatch.undo()
    assert max(peaks(base, left.space, footprints).values()) <= limit < max(found.values())
    monkeypatch.setattr(cells_of_memory, "MOST_LISTED", 5)  # of numbers only the ends
    ends = [(config.model.n_layers, config.model.d_model) for _, config in memory_cells(base, space, 40).judged]
    assert sorted(ends) == [(2, 128), (2, 512), (24, 128), (24, 512)]
    assert memory_cells(base, space, 40).unjudged == 5


def depths_and_widths(space: Space) -> list[tuple[object, object]]:
    return [(depth, width) for depth in space["model.n_layers"].grid(2) for width in space["model.d_model"].grid(2)]


def test_an_axis_is_judged_where_what_governs_it_lets_it_be(tmp_path: Path, footprints: Footprints) -> None:
    """Whether the governing path changes memory itself or not, and whether its value is the end of a range."""
    base = wide(tmp_path)
    deep = Axis("model.n_layers", Choice((2, 24)))
    for governing, when in (
        (Axis("optim.name", Choice(("adamw", "sgd"))), When("optim.name", ("sgd",))),
        (Axis("schedule.kind", Choice(("constant", "cosine"))), When("schedule.kind", ("cosine",))),
        (Axis("schedule.warmup_steps", Int(0, 2)), When("schedule.warmup_steps", (1,))),
    ):
        space = Space((governing, Axis(deep.path, deep.domain, when)))
        depths = {config.model.n_layers for _, config in memory_cells(base, space, 40).judged}
        assert depths == {2, 8, 24}
        most = footprints.of(trial_config({"model.n_layers": 8}, base)).peak_bytes(1)
        left = take_out(base, space, most, footprints)
        assert [cell for cell, _ in left.taken_out] == ["model.n_layers=24"]


# ---- where the trials train ---------------------------------------------------------------------------------------


def driver_of(folder: Path, limit: int | None, said: list[str]) -> SweepDriver:
    """A driver of a sweep over depths, which has not started Ray."""
    base = wide(folder)
    space = Space((Axis("model.n_layers", Choice((2, 24))),))
    settings = SweepSettings(space=space.to_json(), trials=2, tokens=1000)
    sweep = Sweep("s", folder / "s", folder, base, settings, space, {}, (), "cpu")
    claim = Claim.acquire(sweep.folder)
    display: Any = SimpleNamespace(note=said.append)
    data: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=40))
    return SweepDriver(sweep, data, SweepRequest(folder, memory_limit=limit), claim, StopSignals(), display)


SLOTS = Slots(2, {"CPU": 1}, {}, 0.0)


def test_on_a_cluster_a_limit_takes_cells_out_and_none_is_said(
    tmp_path: Path, footprints: Footprints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's memory is not theirs; what a limit leaves needs no machine to be told."""
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    said: list[str] = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    unlimited = driver_of(tmp_path / "a", None, said)._within_memory(SLOTS)
    assert [*unlimited.space["model.n_layers"].grid(2)] == [2, 24] and "memory" not in unlimited.identity
    assert unlimited.footprints is not None and unlimited.footprints.vocab_size == 40  # its trials predict all the same
    assert said == ["memory is not looked at on a cluster unless --memory-limit says what a worker there may take"]
    found = peaks(wide(tmp_path), Space((Axis("model.n_layers", Choice((2, 24))),)), footprints)
    limit = round(sum(found.values()) / 2 / 0.92)
    limited = driver_of(tmp_path / "b", limit, said)._within_memory(SLOTS)
    assert [*limited.space["model.n_layers"].grid(2)] == [2] and limited.memory_limit == limit
    assert [cell for cell, _ in limited.taken_out] == ["model.n_layers=24"]


def test_a_signal_while_memory_is_looked_at_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: elsewhere the first signal is a wish."""
    driver = driver_of(tmp_path, None, [])

    def interrupted(*_: object, **__: object) -> Allowed:
        os.kill(os.getpid(), signal.SIGINT)
        return Allowed(driver.sweep.space)

    monkeypatch.setattr("orchestrator.sweeps.driver.allowed", interrupted)
    with driver.signals.heard():
        with pytest.raises(KeyboardInterrupt):
            driver._within_memory(SLOTS)
        assert "memory" not in driver.sweep.identity
        driver.signals.reason = None
        interrupted()
        assert driver.signals.reason == "SIGINT"


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_trials_that_share_a_gpu_share_its_memory(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they may allocate and their contexts fit together; each is held to its part."""
    free = 23 * GIB
    part = part_of_gpu(share, free).bytes
    assert part is not None
    assert (part + CONTEXT_BYTES) / share == pytest.approx(free + CONTEXT_BYTES)
    monkeypatch.setattr(memory_limit, "_free_on_gpu", lambda: free)
    driver = driver_of(tmp_path, None, [])
    driver.sweep = replace(driver.sweep, device="cuda")
    seen: list[Any] = []

    def looked(base: RunConfig, space: Space, data: object, limit: Any, *_: object, **__: object) -> Allowed:
        seen.append(limit.bytes)
        return Allowed(space)

    monkeypatch.setattr("orchestrator.sweeps.driver.allowed", looked)
    sweep = driver._within_memory(Slots(4, {"CPU": 1, "GPU": share}, {}, share))
    assert seen == [part] and sweep.memory_limit == (part if share < 1 else None)


def test_on_a_gpu_cells_are_taken_out_by_what_is_free(tmp_path: Path, footprints: Footprints) -> None:
    """Without a limit said; the micro-batch of what is left is measured only where the GPU is."""
    base = wide(tmp_path)
    space = Space((Axis("model.n_layers", Choice((2, 24))),))
    found = peaks(base, space, footprints)
    limit = part_of_gpu(1.0, round(sum(found.values()) / 2 / 0.92))
    ask: dict[str, Any] = {"device": "cuda", "threads": 1, "cache_dir": tmp_path, "say": lambda text: None}
    data: Any = None
    left = allowed(base, space, data, limit, footprints, is_here=False, **ask)
    assert [cell for cell, _ in left.taken_out] == ["model.n_layers=24"]


# ---- real sweeps --------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_trials_are_predicted_and_the_driver_never_loads_torch(sweeps: SweepPlace) -> None:
    """It would take the cores that the trials start on. The control: the processes of the trials have it loaded."""
    command = sweeps.start_sweep("lean", *RANDOM, "--trials", "3", "--json", "device=cpu", "budget.steps=240")
    loaded, trials_loaded = [], False
    while command.exitcode is None:
        loaded.append(has_torch(command.pid))
        trials_loaded = trials_loaded or any(has_torch(process.pid) for process in command.trainers())
        time.sleep(0.2)
    command.expect(0)
    assert trials_loaded and len(loaded) > 5 and not any(loaded)
    told = assert_sweep_told(sweeps.runs, "lean")
    predicted = [values for run in told for (_, name), values in run.history.items() if name == "mem/predicted_gib"]
    assert len(predicted) == 3 and all(0.3 < value < 2 for [value] in predicted)
    learnt = json.loads((sweeps.runs / ".cache" / "memory.json").read_text())["cpu"]["samples"]
    assert learnt and all(100 << 20 < sample["measured_bytes"] < 2 << 30 for sample in learnt)
    assert "mem/predicted_gib is left out" not in command.output
    seconds_until_gone(command.family)


def has_torch(pid: int) -> bool:
    with contextlib.suppress(OSError):  # it has just ended
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    return False


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
