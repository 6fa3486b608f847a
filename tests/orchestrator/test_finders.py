"""find-lr and find-batch: what they try, what they say, and that they leave no run behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import batch_findings, memory_limit
from orchestrator.batch_finder import BatchFindings, available_rows, find_batch, run_probe
from orchestrator.batch_findings import BatchQuestion, busy_notes, commands, explanation, machine_for
from orchestrator.batch_search import RESOLUTION, expected_peak, search
from orchestrator.cli import main
from orchestrator.finder_plots import plot_batch, plot_lr_curve
from orchestrator.finders import Typed, whole_folder
from orchestrator.lr_finder import lr_path, one_process
from orchestrator.memory_limit import Limit, available_memory, limit_for, parse_size
from orchestrator.runs import find_runs
from orchestrator.target import Flags, Target, split
from orchestrator.tracking import Store, open_store
from orchestrator.verbs.checked import check
from tests.orchestrator.faults import WORDS
from trainers.batch_probe import Job, Probe
from trainers.config import RunConfig
from trainers.config_io import build_config, dump_yaml, override
from trainers.data.prepare import prepare
from trainers.errors import UserError
from trainers.lr_curve import LrCurve, geometric, suggest
from trainers.presets import preset

PROJECT = Path(__file__).parents[2]
GIB = 1 << 30


def tiny(folder: Path, **changes: Any) -> RunConfig:
    text = folder / "text.txt"
    text.write_text(" ".join(WORDS[(index * index) % 17] for index in range(6000)))
    base: dict[str, Any] = {
        "preset": "custom/tiny",
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "context_length": 32},
        "data": {"sources": [{"corpus": str(text)}]},
        "batch": {"sequences": 12},
        "budget": {"steps": 10},
        "optim": {"clip_norm": None},
    }
    return build_config({**base, **changes})


# ---- which sizes to try: a law over any linear memory ------------------------------------------------------


class Memory:
    """A machine whose peaks are a line, and which remembers what it was asked to hold."""

    def __init__(self, fixed: int, row: int, limit: int):
        self.fixed, self.row, self.limit = fixed, row, limit
        self.asked: list[int] = []

    def peak(self, micro: int) -> int:
        return self.fixed + self.row * micro

    def probe(self, micro: int) -> Probe:
        self.asked.append(micro)
        peak = self.peak(micro)
        if peak > 2 * self.limit:
            return Probe(micro, "killed", "SIGKILL", limit_bytes=self.limit)
        return Probe(micro, "ok", "", 1.0, micro / (10 + micro), self.fixed, peak, peak, None, self.limit, "cpu")


lines = st.builds(Memory, st.integers(0, 10**9), st.integers(1, 10**8), st.integers(10**6, 4 * 10**9))


@given(lines, st.integers(1, 5000), st.integers(1, 5000))
def test_the_search_finds_the_largest_and_never_tries_what_would_not_fit(memory: Memory, most: int, share: int) -> None:
    probes = search(memory.probe, most=most, limit_bytes=memory.limit, share=share, foresee=True)
    fitting = [probe.micro for probe in probes if probe.fits]
    truth = min(most, (memory.limit - memory.fixed) // memory.row)
    assert [probe.micro for probe in probes] == sorted({probe.micro for probe in probes})
    assert all(memory.peak(micro) <= memory.limit for micro in memory.asked if micro > 1)
    assert len(memory.asked) <= 30
    if truth < 1:
        assert fitting == []
        return
    assert fitting[-1] <= truth <= fitting[-1] + max(1, fitting[-1] // RESOLUTION)
    assert most > truth or fitting[-1] == most
    assert any(share % micro == 0 for micro in fitting)
    assert max(part for part in range(1, share + 1) if share % part == 0 and part <= fitting[-1]) in fitting


def test_without_foresight_the_machine_is_asked_for_too_much() -> None:
    """The negative control; on CUDA that is an answer like any other."""
    memory = Memory(10**8, 10**7, 10**9)
    search(memory.probe, most=4096, limit_bytes=memory.limit, share=8, foresee=False)
    assert max(memory.asked) == 128 and memory.peak(128) > memory.limit


def test_the_line_through_far_peaks_is_not_fooled_by_near_ones() -> None:
    def at(micro: int, peak: int) -> Probe:
        return Probe(micro, "ok", "", 1.0, 1.0, 100, peak, peak, None, None, "cpu")

    assert expected_peak([], 8) is None
    assert expected_peak([at(1, 110)], 8) == 180  # alone: all but what was there before grows with the rows
    wavering = [at(1, 110), at(64, 740), at(65, 700)]
    assert expected_peak(wavering, 128) == 1280  # 700 + (700 - 110) / 64 * 63
    assert expected_peak([at(1, 110), at(2, 110)], 64) == 110


# ---- what it says ------------------------------------------------------------------------------------------


def findings(speeds: dict[int, float], share: int, bound: str = "most") -> BatchFindings:
    probes = tuple(
        Probe(micro, "ok", "", 1e3 * micro / speed, speed, 100, 100 + micro, 100 + micro, None, GIB, "cpu")
        for micro, speed in sorted(speeds.items())
    )
    return BatchFindings(probes, "cpu", GIB, "--memory-limit", 64, share, bound)


def test_largest_fastest_and_the_one_to_use_are_told_apart() -> None:
    found = findings({1: 100, 2: 190, 3: 250, 4: 300, 8: 500, 16: 700, 32: 650}, share=12, bound="memory")
    assert (found.largest.micro, found.fastest.micro, found.recommended.micro) == (32, 16, 4)
    said = " ".join(explanation(found))
    assert "largest micro-batch that fits is 32: more rows pass the limit of 1.0 GiB" in said
    assert "fastest is 16" in said and "8% more than the largest" in said
    assert "use 4" in said and "12 rows" in said and "3 micro-batches a step" in said and "batch of 16 rows" in said
    assert found.override == "batch.micro_sequences=4"
    same = findings({1: 100, 2: 190, 4: 300}, share=4)
    assert "fastest too" in " ".join(explanation(same)) and "no accumulation" in explanation(same)[-1]
    assert same.to_json()["recommended"] == 4 and same.to_json()["probes"][0]["fits"] is True


def test_a_busy_machine_is_told() -> None:
    assert busy_notes(3.0) == [] and "73%" in busy_notes(73.0)[0]


def test_what_is_recommended_is_a_configuration_that_is_accepted(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    found = findings({1: 100, 2: 190, 4: 300, 5: 900, 8: 1000}, share=config.sequences_per_step)
    assert override(config, [found.override]).accumulation == 3
    with pytest.raises(UserError, match="multiple"):  # the control: the fastest does not divide the batch
        override(config, [f"batch.micro_sequences={found.fastest.micro}"])


def test_the_commands_repeat_what_was_typed(tmp_path: Path) -> None:
    config = preset("fundamentallm/small")
    flags = Flags(data=("my text.txt",), precision="bf16", seed=3)
    typed = Typed(
        Target(config, "preset", "fundamentallm/small"), ("optim.lr=1", "budget.steps=5"), flags, Path("/some where")
    )
    command = shlex.split(typed.command("train", "optim.lr=0.001", without=["optim.lr"]))
    assert command[:2] == ["orchestrate", "train"]
    assert split(command[2:5]) == ("fundamentallm/small", ["budget.steps=5", "optim.lr=0.001"])
    assert command[5:] == [
        *("--data", "my text.txt", "--precision", "bf16", "--seed", "3", "--runs-dir", "/some where"),
    ]
    assert lr_path(config) == "optim.lr"


def test_find_batch_prints_commands_that_a_sweep_and_a_training_take(tmp_path: Path) -> None:
    """With the size that was found in the place of the one that was typed."""
    found = findings({1: 100, 2: 190, 4: 300}, share=8)
    flags = Flags(precision="bf16", workers=1)
    target = Target(preset("fundamentallm/small"), "preset", "fundamentallm/small")
    typed = Typed(target, ("batch.micro_sequences=8", "budget.steps=5"), flags, tmp_path)
    told = commands(typed, found)
    assert list(told) == ["train", "tune"]
    for verb, command in told.items():
        checked = check(shlex.split(command))
        assert checked.verb == verb and checked.target is not None
        assert checked.target.config.batch.micro_sequences == 4
    assert shlex.split(told["tune"])[-2:] == ["--runs-dir", str(tmp_path)] and "--space lr" in told["tune"]
    broken = told["tune"].replace("--space lr", "--space rate")
    with pytest.raises(UserError, match="rate"):  # the control: a command that no sweep takes
        check(shlex.split(broken))


def test_find_batch_takes_the_cpus_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container with a quota those are fewer than the machine has; Ray's workers get no more either."""
    for cpus, workers, threads in ((6, 1, 6), (6, 2, 3), (1, 2, 1)):
        monkeypatch.setattr(batch_findings, "usable_cpus", lambda cpus=cpus: cpus)
        config = tiny(tmp_path, workers=workers)
        assert machine_for(config, BatchQuestion("1GiB", 8, 1)).threads == threads


def test_several_workers_are_one_process_with_the_same_step(tmp_path: Path) -> None:
    two = tiny(tmp_path, workers=2)
    alone = one_process(two)
    assert (alone.workers, alone.micro_sequences, alone.accumulation) == (1, 6, 2)
    assert alone.sequences_per_step == two.sequences_per_step and alone.optim == two.optim
    assert one_process(alone) is alone


# ---- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("2GiB", 2 << 30), ("800 MB", 800_000_000), ("1.5gib", 3 << 29), ("64KiB", 65536), ("7B", 7), (" 1 TB ", 10**12)],
)
def test_sizes_are_read_with_their_units(text: str, n_bytes: int) -> None:
    assert parse_size(text, "--memory-limit") == n_bytes


@pytest.mark.parametrize("text", ["2", "GiB", "-1GiB", "0GiB", "0.1B", "2 gibs", "", "nan GiB", "1e3MB"])
def test_sizes_without_a_unit_or_a_meaning_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--memory-limit"):
        parse_size(text, "--memory-limit")


def test_the_limit_leaves_headroom_and_is_shared_by_the_workers() -> None:
    one, two = limit_for("cpu", None, 1), limit_for("cpu", None, 2)
    available, _ = available_memory()
    assert one.bytes is not None and two.bytes is not None
    assert 0 < two.bytes < one.bytes < available + GIB and "headroom" in one.source and "2 workers" in two.source
    assert limit_for("cpu", "3GiB", 2) == Limit(3 * GIB, "--memory-limit")
    assert limit_for("cuda", None, 1).bytes is None


def test_a_container_has_what_its_cgroup_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(f"{1 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{3 << 18}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 18}\n")
    monkeypatch.setattr(memory_limit, "_cgroup_folders", lambda: [tmp_path / "none", tmp_path])
    assert available_memory() == (1 << 19, "in this container")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory()[1] == "on this machine"


# ---- probes as processes ---------------------------------------------------------------------------------------


def job_for(config: RunConfig, cache: Path, **changes: Any) -> Job:
    prepare(config, cache)
    job: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "cache_dir": str(cache),
        "micro": 1,
        "accumulation": 1,
        "steps": 1,
        "limit_bytes": 8 * GIB,
        "threads": 1,
    }
    return Job(**(job | changes))


def test_a_probe_that_the_kernel_kills_is_an_answer(tmp_path: Path) -> None:
    job = job_for(tiny(tmp_path), tmp_path / "cache", steps=10**6)
    answers: list[Probe] = []
    waiting = threading.Thread(target=lambda: answers.append(run_probe(job)))
    before = {child.pid for child in psutil.Process().children()}
    waiting.start()
    for _ in range(300):
        mine = [child for child in psutil.Process().children() if child.pid not in before]
        if mine:
            break
        time.sleep(0.05)
    mine[0].send_signal(signal.SIGKILL)
    waiting.join(60)
    assert answers == [Probe(1, "killed", "SIGKILL", limit_bytes=8 * GIB)] and not answers[0].fits


def test_a_probe_that_fails_otherwise_is_no_answer(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    with pytest.raises(UserError, match="text"):  # more rows than there is text
        run_probe(job_for(config, tmp_path / "cache", micro=100_000))
    broken = replace(job_for(config, tmp_path / "cache"), config={"no": "configuration"})
    with pytest.raises(RuntimeError, match="the probe of a micro-batch of 1 failed"):
        run_probe(broken)


def test_find_batch_measures_the_real_model(tmp_path: Path) -> None:
    config, said = tiny(tmp_path), []
    found = find_batch(
        config, Limit(8 * GIB, "--memory-limit"), cache_dir=tmp_path / "cache", threads=1, most=4, steps=1,
        say=said.append,
    )  # fmt: skip
    assert [probe.micro for probe in found.probes] == [1, 2, 4] and found.bound == "most" and found.share == 12
    assert all(probe.fits and probe.tokens_per_s for probe in found.probes) and found.largest.micro == 4
    assert len(said) == 3 and "tokens/s" in said[0]
    assert override(config, [found.override]).micro_sequences == found.recommended.micro
    assert json.loads(json.dumps(found.to_json()))["fastest"] == found.fastest.micro


@pytest.mark.slow
def test_find_batch_stops_at_the_memory_that_it_was_given(tmp_path: Path) -> None:
    model = {"d_model": 64, "n_layers": 2, "n_heads": 4, "context_length": 128, "dropout": 0.1}
    config = tiny(tmp_path, model=model, batch={"sequences": 24})
    ask: dict[str, Any] = {"cache_dir": tmp_path / "cache", "threads": 1, "steps": 1}
    least = find_batch(config, Limit(8 * GIB, ""), most=1, **ask).largest.peak_bytes
    assert least is not None
    limit = least + (60 << 20)
    found = find_batch(config, Limit(limit, "--memory-limit"), **ask)
    assert found.bound == "memory" and 1 < found.largest.micro < 120
    assert all((probe.peak_bytes or 0) <= limit for probe in found.probes if probe.fits)
    assert any(not probe.fits for probe in found.probes)
    assert all(probe.peak_bytes is not None and probe.peak_bytes < limit + (64 << 20) for probe in found.probes)


def test_text_that_cannot_fill_two_rows_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    data = prepare(config, tmp_path / "cache")
    there = available_rows(config, data)
    assert there is not None and 100 < there < 1000
    long = override(config, ["model.context_length=16384"])
    with pytest.raises(UserError, match="2 rows"):
        available_rows(long, data)


# ---- the pictures -----------------------------------------------------------------------------------------------


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_any_curve_can_be_drawn(tmp_path: Path) -> None:
    lrs = geometric(1e-6, 1.0, 60)
    falling = LrCurve(lrs, tuple(4.0 - 0.03 * min(index, 80 - index) for index in range(60)), 4.0, 5, "completed")
    broken = LrCurve((1e-3, 2e-3), (4.0, 900.0), 4.0, 5, "diverged", 2e-3)
    nothing = LrCurve((), (), float("nan"), 5, "nonfinite", None)
    for number, curve in enumerate((falling, broken, nothing)):
        plot_lr_curve(curve, suggest(curve) if curve is falling else None, tmp_path / f"{number}.png", "a $title")
        assert png_size(tmp_path / f"{number}.png")[0] > 1000
    one = findings({1: 100}, share=1)
    refused = Probe(2, "not tried", "foreseen", peak_bytes=2 * GIB, limit_bytes=GIB)
    killed = Probe(4, "killed", "SIGKILL")
    for number, found in enumerate(
        (one, BatchFindings((*one.probes, refused, killed), "cpu", 200, "", 64, 1, "memory"))
    ):
        plot_batch(found, tmp_path / f"batch-{number}.png", "title")
        assert png_size(tmp_path / f"batch-{number}.png")[0] > 1000


# ---- folders ------------------------------------------------------------------------------------------------------


def test_a_finding_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / ".find" / "lr-x"
    with whole_folder(target) as draft:
        (draft / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as draft:
        (draft / "b").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in target.parent.iterdir()] == ["lr-x"]
    assert [path.name for path in target.iterdir()] == ["a"]
    with whole_folder(target) as draft:
        (draft / "b").write_text("new")
    assert [path.name for path in target.iterdir()] == ["b"]


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, empty_store: Path, no_store_named: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tiny.yaml and runs/ with an empty store; the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORCHESTRATE_RUNS", raising=False)
    (tmp_path / "tiny.yaml").write_text(dump_yaml(tiny(tmp_path)))
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    return tmp_path


def tracked(store: Store, kind: str) -> list[Any]:
    experiment = store.client.get_experiment_by_name("custom")
    return store.client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'") if experiment else []


def test_find_lr_keeps_a_curve_and_no_run(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sweep = ["find-lr", "tiny.yaml", "--from", "1e-5", "--to", "1e4", "--steps", "40"]
    assert main([*sweep, "--json"]) == 0
    told, progress = capfd.readouterr()
    result = json.loads(told)
    found, folder = result["suggestion"], Path(result["folder"])
    assert 1e-5 < found["suggested"] < found["minimum"] < result["curve"]["ended_at"]
    assert json.loads((folder / "lr.json").read_text())["curve"] == result["curve"]
    assert folder.parent == place / "runs" / ".find" and png_size(folder / "lr.png") and "step" in progress
    assert f"optim.lr={found['suggested']:.2g}" in result["commands"]["train"]
    assert "--set-space 'optim.lr=log(" in result["commands"]["tune"]
    assert find_runs(place / "runs") == []

    (run,) = tracked(open_store(place / "runs"), "find-lr")
    client = open_store(place / "runs").client
    assert run.info.status == "FINISHED" and run.data.tags["stop_reason"] == result["curve"]["ended"]
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.value for metric in sorted(losses, key=lambda metric: metric.step)] == result["curve"]["losses"]
    assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} == {"lr.json", "lr.png"}

    assert main(sweep) == 0  # once more, for people: the same curve in the same place
    told, _ = capfd.readouterr()
    assert "steepest descent" in told and result["commands"]["train"] in told.splitlines()[-3].strip()
    again = json.loads((folder / "lr.json").read_text())
    assert again["curve"] == result["curve"] and len(list(folder.parent.iterdir())) == 1


def test_find_lr_without_a_suggestion_says_why_and_keeps_the_curve(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["find-lr", "tiny.yaml", "--from", "1e-12", "--to", "1e-11", "--steps", "20"]) == 3
    told, said = capfd.readouterr()
    assert (
        "did not fall" in said and "Raise --to" in said and "Traceback" not in said and "orchestrate train" not in told
    )
    (folder,) = (place / "runs" / ".find").iterdir()
    assert json.loads((folder / "lr.json").read_text())["suggestion"] is None
    (run,) = tracked(open_store(place / "runs"), "find-lr")
    assert run.info.status == "FAILED"


BAD = {
    "bounds reversed": (["find-lr", "tiny.yaml", "--from", "1", "--to", "1e-4"], "Did you mean --from 0.0001 --to 1"),
    "zero steps": (["find-lr", "tiny.yaml", "--steps", "0"], "--steps 0"),
    "a rate of zero": (["find-lr", "tiny.yaml", "--from", "0"], "above 0"),
    "an unknown setting": (["find-lr", "tiny.yaml", "optim.rl=1"], "optim.lr"),
    "a limit without unit": (["find-batch", "tiny.yaml", "--memory-limit", "2"], "with its unit"),
    "a limit below the model": (["find-batch", "tiny.yaml", "--memory-limit", "9KiB"], "weights, gradients and"),
    "a limit below one row": (["find-batch", "tiny.yaml", "--memory-limit", "60MiB"], "not even a micro-batch of one"),
    "bounds beyond numbers": (["find-lr", "tiny.yaml", "--from", "1e-300", "--to", "1e300"], "--to 1e+300"),
    "steps beyond memory": (["find-lr", "tiny.yaml", "--steps", "1000000000"], "at most 100,000"),
    "a rate in words": (["find-lr", "tiny.yaml", "--from", "low"], "a valid number, got 'low'"),
    "a limit below the model, rehearsed": (
        ["find-batch", "tiny.yaml", "--memory-limit", "9KiB", "--dry-run"],
        "weights, gradients and",
    ),
    "a limit beyond bytes": (["find-batch", "tiny.yaml", "--memory-limit", f"{'9' * 400}GiB"], "with its unit"),
    "no sizes": (["find-batch", "tiny.yaml", "--max", "0"], "--max 0"),
    "no timed steps": (["find-batch", "tiny.yaml", "--steps", "0"], "--steps 0"),
    "a device that is not there": (["find-batch", "tiny.yaml", "--device", "mps"], "mps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_leaves_nothing(case: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    typed, expected = BAD[case]
    assert main(typed) == 2
    _, said = capfd.readouterr()
    assert expected in said and "Traceback" not in said
    assert not (place / "runs" / ".find").exists() and tracked(open_store(place / "runs"), "find-lr") == []


def test_a_dry_run_leaves_nothing(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    assert main(["find-lr", "tiny.yaml", "--dry-run", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["lrs"]) == 120
    assert main(["find-batch", "tiny.yaml", "--dry-run", "--json", "--max", "24", "--memory-limit", "1GiB"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["sizes"] == [1, 2, 4, 8, 16, 24] and answer["limit_bytes"] == GIB
    for verb in ("find-lr", "find-batch"):
        assert main([verb, "tiny.yaml", "--dry-run"]) == 0
    assert "find" in capfd.readouterr().out and sorted(place.rglob("*")) == before


def test_find_batch_says_keeps_and_tracks(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["find-batch", "tiny.yaml", "--max", "2", "--steps", "1", "--json"]) == 0
    told, progress = capfd.readouterr()
    result = json.loads(told)
    assert "micro-batch 2: " in progress and [probe["micro"] for probe in result["findings"]["probes"]] == [1, 2]
    assert all(result["override"] in command for command in result["commands"].values())
    assert list(result["commands"]) == ["train", "tune"] and png_size(Path(result["folder"]) / "batch.png")
    (run,) = tracked(open_store(place / "runs"), "find-batch")
    assert run.data.tags["find.largest"] == "2" and run.data.metrics["mem/peak_gib"] > 0.05
    assert find_runs(place / "runs") == []


@pytest.mark.parametrize("verb", ["find-lr", "find-batch"])
def test_ctrl_c_leaves_nothing_half_made(verb: str, place: Path) -> None:
    (place / "tmp").mkdir()
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "TMPDIR": str(place / "tmp")}
    more = ["--from", "1e-7", "--to", "1e-5", "--steps", "100000"] if verb == "find-lr" else ["--steps", "1000000"]
    command = [sys.executable, "-m", "orchestrator", verb, "tiny.yaml", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as one:
        assert one.stdout is not None
        begun = "range test  step" if verb == "find-lr" else "micro-batch 1"
        for line in one.stdout:
            if begun in line:
                break
        time.sleep(3.0 if verb == "find-batch" else 0.0)
        children = psutil.Process(one.pid).children(recursive=True)
        assert (len(children) > 0) == (verb == "find-batch")
        one.send_signal(signal.SIGINT)
        rest = one.stdout.read()
        assert one.wait(60) == 130 and "Traceback" not in rest and "stopped" in rest
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == [] and list((place / "tmp").iterdir()) == []
    assert not (place / "runs" / ".find").exists() and tracked(open_store(place / "runs"), verb) == []
