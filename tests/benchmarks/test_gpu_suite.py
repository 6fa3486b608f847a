"""The GPU suite around its checks: verdicts, processes and their clock, the bench tables, and the whole of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_checks, gpu_suite, gpu_table
from benchmarks.gpu_check import Check, Finding, Skipped, told, without_paths
from benchmarks.gpu_checks import CHECKS, NO_TIME, examine
from benchmarks.gpu_process import Died, OutOfTime, answers
from benchmarks.gpu_rig import CPU, Rig
from benchmarks.gpu_table import Cell, Measured, Table, cells
from benchmarks.measure import Figure
from benchmarks.tables import table
from trainers.batch_probe import Probe
from trainers.config import RunConfig
from trainers.presets import PRESETS

KNOWN = {check.name: check for check in CHECKS}


# ---- verdicts -------------------------------------------------------------------------------------------------


def a_claim(rig: Rig) -> list[Figure]:
    """Half is at most one."""
    return [Figure("half", 0.5, "", bar=1.0)]


def broken(rig: Rig) -> list[Figure]:
    """Something raises."""
    raise RuntimeError("CUDA error in /home/somebody/secret/kernel.cu\nand more")


def undefined(rig: Rig) -> list[Figure]:
    """A figure is no number."""
    return [Figure("nothing", float("nan"), "", bar=1.0)]


def not_here(rig: Rig) -> list[Figure]:
    """Cannot be made."""
    raise Skipped("there is no such device")


def test_a_verdict_is_that_of_the_figures(tmp_path: Path) -> None:
    rig = Rig(CPU, tmp_path, tiny=True)
    found = {measure.__name__: Check(measure).found(rig) for measure in (a_claim, broken, undefined, not_here)}
    assert [finding.verdict for finding in found.values()] == ["pass", "fail", "fail", "skipped"]
    assert found["a_claim"].claim == "Half is at most one."
    assert found["broken"].reason.startswith("RuntimeError: CUDA error in kernel.cu (at broken")
    assert found["not_here"].reason == "there is no such device"
    assert gpu_suite.failed(list(found.values()), []) == ["broken", "undefined"]
    again = Finding.from_json(json.loads(json.dumps(found["a_claim"].to_json())))
    assert again == found["a_claim"]


def test_folders_of_the_machine_are_not_told() -> None:
    assert without_paths("in /a/b/c.py, and 3/4 of 1/2; see /tmp/x-1/y") == "in c.py, and 3/4 of 1/2; see y"
    assert without_paths("https://example.org/a/b") == "https://example.org/a/b"
    assert "/" not in told(FileNotFoundError(2, "No such file", "/home/me/run/text.txt"))


# ---- processes and their clock ------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a module of some lines that a fresh process finds."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(source: str) -> str:
        (tmp_path / "answering.py").write_text(source)
        return "answering"

    return make


def test_a_process_answers_in_lines(module: Callable[[str], str]) -> None:
    assert list(answers(module("print(input() * 2)\nprint('b')"), "a", 30)) == ["aa\n", "b\n"]


def test_a_process_that_fails_is_told_by_its_last_words(module: Callable[[str], str]) -> None:
    seen = []
    with pytest.raises(Died, match=r"exit code 1: ValueError: in c\.txt"):
        for line in answers(module("print('a', flush=True)\nraise ValueError('in /a/b/c.txt')"), "", 30):
            seen.append(line)
    assert seen == ["a\n"]


def gone(pid: int, patience_s: float = 20.0) -> bool:
    """Whether a process ends in time; one that nobody has collected yet has ended."""
    until = time.monotonic() + patience_s
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX" or time.monotonic() > until:
            return state in "ZX"
        time.sleep(0.05)


def test_the_clock_ends_a_process_with_all_that_it_started(module: Callable[[str], str]) -> None:
    source = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    started = []
    with pytest.raises(OutOfTime):
        for line in answers(module(source), "", 2.0):
            started.append(int(line))
    assert len(started) == 1
    assert gone(started[0]) and not gone(os.getpid(), patience_s=0.0)
    with pytest.raises(OutOfTime):
        next(answers("answering", "", 0.0))


def examined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *processes: Any) -> tuple[list[Finding], list[list[str]]]:
    """Findings of three checks whose processes are `processes`: what each answers, and what ends it."""
    asked: list[list[str]] = []
    coming = iter(processes)

    def fake(module: str, question: str, seconds: float, environment: Any) -> Iterator[str]:
        names = json.loads(question)["names"]
        asked.append(names)
        verdicts, end = next(coming)
        for name, verdict in zip(names, verdicts, strict=False):
            yield json.dumps(KNOWN[name].ended(verdict, "").to_json())
        if end is not None:
            raise end

    monkeypatch.setattr(gpu_checks, "answers", fake)
    checks = [KNOWN[name] for name in ("fp32_losses", "bf16_losses", "int8_sums")]
    return examine(checks, "cpu", tmp_path, tiny=True, seconds=60, say=lambda finding: None), asked


def test_a_check_that_kills_its_process_fails_and_the_next_ones_are_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, asked = examined(monkeypatch, tmp_path, (["pass"], Died("exit code -11: ")), (["pass"], None))
    assert [finding.verdict for finding in found] == ["pass", "fail", "pass"]
    assert "exit code -11" in found[1].reason
    assert asked[1] == ["int8_sums"]


def test_checks_for_which_there_was_no_time_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, _ = examined(monkeypatch, tmp_path, (["pass"], OutOfTime()))
    assert [(finding.verdict, finding.reason) for finding in found[1:]] == [("skipped", NO_TIME)] * 2


def test_a_fresh_process_takes_over_behind_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, asked = examined(monkeypatch, tmp_path, (["pass", "fail"], None), (["pass"], None))
    assert [finding.verdict for finding in found] == ["pass", "fail", "pass"] and asked[1] == ["int8_sums"]


# ---- the tables -----------------------------------------------------------------------------------------------


def silently(measured: Measured) -> None:
    pass


def test_a_preset_that_is_not_there_is_skipped_and_said(tmp_path: Path) -> None:
    (found,) = Table("cpu", tmp_path, tiny=True).measured([Cell("nobody/none", False)], 60, silently)
    assert (found.fate, found.reason) == ("skipped", "no such preset")


def test_cells_for_which_there_was_no_time_say_so(tmp_path: Path) -> None:
    found = list(Table("cuda", tmp_path).measured(cells(), 0.0, silently))
    assert {(cell.fate, cell.reason) for cell in found} == {("skipped", "the time was up before it")}
    assert [cell.way for cell in found] == ["eager"] * 6 + ["compiled"] * 6
    assert [cell.preset for cell in found] == list(gpu_table.NAMES) * 4


def test_a_cell_is_the_preset_but_for_text_and_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_table, "write_text", lambda path, tokens, codes: path.write_text("x"))
    bench = Table("cuda", tmp_path)
    for cell in cells():
        preset, config = PRESETS[cell.preset](), bench.config(cell)
        assert (config.model, config.optim, config.compile) == (preset.model, preset.optim, cell.compiled)
        assert config.sequence_length == preset.sequence_length and config.precision.compute == "bf16"
        assert config.micro_sequences == preset.micro_sequences * (4 if cell.larger else 1) == bench.rows(cell)
        assert config.accumulation == preset.accumulation
        assert config.tokenizer.kind == "characters"  # the package that cuts bytes into pairs may be missing


def probe_of(fate: str) -> Probe:
    speed = {"step_ms": 10.0, "tokens_per_s": 1000.0, "peak_bytes": 2**30, "product_flops": 1e9}
    return Probe(4, fate, "CUDA out of memory", **(speed if fate == "ok" else {}))  # type: ignore[arg-type]


@pytest.mark.parametrize("fate", ["ok", "out of memory", "dies", "too late"])
def test_what_becomes_of_a_cell(fate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(self: Table, config: RunConfig, rows: int, seconds: float) -> Probe:
        if fate == "dies":
            raise Died("exit code 1: no compiler")
        if fate == "too late":
            raise OutOfTime
        return probe_of(fate)

    monkeypatch.setattr(Table, "_probe", probe)
    (found,) = Table("cpu", tmp_path, tiny=True).measured([Cell("codelm/tiny", False)], 60, silently)
    expected = {"dies": "failed", "too late": "skipped"}.get(fate, fate)
    assert found.fate == expected and (found.reason or fate == "ok")
    assert bool(gpu_suite.failed([], [found])) is (fate == "dies")
    if fate == "ok":
        config = Table("cpu", tmp_path, tiny=True).config(Cell("codelm/tiny", False))
        parameters = sum(p.numel() for p in Rig(CPU, tmp_path, tiny=True).model(config).parameters())
        per_token = 6 * parameters + 12 * 2 * 64 * 32
        vocabulary = 128 * 64  # of the rig's model, where the cell's has 256 rows
        assert found.utilisation == pytest.approx((per_token + 6 * vocabulary) * 1000 / 1e9, rel=0.2)
        assert found.predicted_bytes and found.predicted_bytes > 16 * parameters
        assert found.plan_error == pytest.approx(1 - found.predicted_bytes / 2**30)
        (told,) = [f for f in gpu_suite.card_figures([found], "cuda") if f.bar is not None]
        assert told.verdict == "MISSED"  # some MB planned, a GiB measured


def test_a_table_shows_every_cell_and_every_check() -> None:
    machine = {"date": "2026-01-01", "gpu": "Card", "cpu": "C", "cores": 2, "threads": 2, "torch": "2", "steal": 0.0}
    done = Measured("a/b", "eager", "ok", "", 8, 512, 12345.0, 1.5, 2**30, 2**29, 1e12, 0.5)
    late = Measured("a/b", "compiled", "skipped", "the time was up before it", 8)
    result = {
        "machine": machine,
        "figures": [],
        "checks": [KNOWN["int8_sums"].ended("skipped", "why").to_json()],
        "cells": [done.to_json(), late.to_json()],
    }
    text = table("gpu_suite", result)
    assert "| a/b | eager | 8 x 512 | 12,345 | 1.5 ms | 1.00 GiB | 0.50 GiB | 50.0% |  |" in text
    assert "| skipped: the time was up before it |" in text
    assert "(`int8_sums`) | skipped | why |" in text


# ---- the whole --------------------------------------------------------------------------------------------------


def test_it_needs_torch_and_what_the_bare_loop_needs_alone() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED: raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import benchmarks.gpu_suite, benchmarks.gpu_overhead
"""
    refused = {"ray", "mlflow", "rich", "typer", "matplotlib", "optuna", "psutil", "tokenizers", "sentencepiece"}
    refused |= {"datasets", "pyarrow", "zstandard", "deepspeed", "bitsandbytes", "peft"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", f"REFUSED = {refused}\n{code}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spoilt = subprocess.run([*command[:2], f"{command[2]}\nimport psutil"], cwd=root, capture_output=True, check=False)
    assert spoilt.returncode == 1


def test_bad_input_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--device", "cpu"]) == 2
    assert gpu_suite.main(["--device", "cpu", "--tiny", "--checks", "nothing"]) == 2
    if not torch.cuda.is_available():
        assert gpu_suite.main([]) == 2
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in said) and "no check nothing" in said[1]


@pytest.mark.slow
def test_the_whole_suite_rehearsed(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    assert gpu_suite.main(["--device", "cpu", "--tiny", "--json", str(result)]) == 0
    text = result.read_text()
    assert str(tmp_path) not in text and platform.node() not in text and "/tmp" not in text
    found = json.loads(text)
    verdicts = {check["name"]: check["verdict"] for check in found["checks"]}
    assert verdicts.keys() == KNOWN.keys() and "fail" not in verdicts.values()
    assert {name for name in ("tf32_losses", "quiet_steps", "predicted_memory") if verdicts[name] != "skipped"} == set()
    assert all(check["reason"] for check in found["checks"] if check["verdict"] == "skipped")
    fates = [(cell["preset"], cell["way"], cell["fate"]) for cell in found["cells"]]
    assert fates[:3] == [(name, "eager", "ok") for name in gpu_table.NAMES]
    assert all(cell["reason"] for cell in found["cells"] if cell["fate"] != "ok")
    assert found["machine"]["date"] and found["tiny"] is True
