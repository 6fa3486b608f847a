"""Laws of generate and evaluate on a run that was really trained, and of the interactive session."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.chat import Chat, setting, shown
from orchestrator.cli import BAD_INPUT, DONE, main
from trainers.errors import UserError

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with one bare run of a few steps."""
    from trainers.config_io import dump_yaml, override
    from trainers.context import LocalContext
    from trainers.loop import train
    from trainers.presets import PRESETS

    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(1000)))
    changes = [f"data.sources.0.corpus={text}", "budget.steps=6", "evaluation.every_steps=2", "samples.count=0"]
    config = override(PRESETS["fundamentallm/tiny"](), changes)
    ctx = LocalContext(folder / "runs" / "tiny")
    (ctx.run_dir / "config.yaml").write_text(dump_yaml(config))
    train(config, ctx)
    ctx.close()
    return folder / "runs"


def generate(capsys: pytest.CaptureFixture[str], runs: Path, *arguments: str) -> Any:
    assert main(["generate", "tiny", "--runs-dir", str(runs), "--device", "cpu", "--json", *arguments]) == DONE
    return json.loads(capsys.readouterr().out)


def test_the_same_seed_writes_the_same_text(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "1 b", "--max-tokens", "30"]
    first = generate(capsys, runs, *arguments)
    assert generate(capsys, runs, *arguments) == first
    assert generate(capsys, runs, *arguments, "--seed", "7")["texts"] != first["texts"]


def test_greedy_is_top_k_1(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--prompt", "1 b", "--prompt", "2", "--max-tokens", "20"]
    greedy = generate(capsys, runs, *prompts, "--greedy")
    assert greedy["texts"] == generate(capsys, runs, *prompts, "--top-k", "1", "--seed", "5")["texts"]
    assert len(greedy["texts"]) == 2


def test_a_stream_is_the_text_at_once(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "9 bottles", "--max-tokens", "40"]
    whole = generate(capsys, runs, *arguments)["texts"][0]
    assert main(["generate", "tiny", "--runs-dir", str(runs), *arguments]) == DONE
    assert capsys.readouterr().out == whole["prompt"] + whole["text"] + "\n"


def test_prompts_come_from_a_file_too(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\r\n", encoding="utf-8")
    said = generate(capsys, runs, "--prompts-file", str(tmp_path / "prompts.txt"), "--max-tokens", "5")
    assert [text["prompt"] for text in said["texts"]] == ["one", "two"]


def test_each_checkpoint_can_be_asked_for(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {
        which: generate(capsys, runs, "--prompt", "1", "--checkpoint", which)["step"]
        for which in ("latest", "best", "6")
    }
    assert steps["latest"] == steps["6"] == 6 and steps["best"] <= 6


@pytest.mark.parametrize("which", ["99", "newest", "-1", "1e3"])
def test_a_checkpoint_that_is_not_there_is_refused(which: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "tiny", "--runs-dir", str(runs), "--prompt", "x", f"--checkpoint={which}"]
    assert main(command) == BAD_INPUT
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad",
    [
        ["--temperature", "0"],
        ["--top-k", "0"],
        ["--top-p", "1.5"],
        ["--max-tokens", "0"],
        ["--seed", "-1"],
        ["--stop", ""],
    ],
)
def test_a_setting_out_of_range_is_refused(bad: list[str], runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "tiny", "--runs-dir", str(runs), "--prompt", "x", *bad]) == BAD_INPUT
    assert bad[0].strip("-").replace("-", "_") in capsys.readouterr().err


def test_an_fp16_run_is_scored_on_a_cpu_in_another_arithmetic(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(runs, tmp_path / "runs")
    settings = tmp_path / "runs" / "tiny" / "config.yaml"
    settings.write_text(settings.read_text().replace("compute: fp32", "compute: fp16"))
    command = ["evaluate", "tiny", "--runs-dir", str(tmp_path / "runs"), "--device", "cpu", "--json"]
    assert main(command) == BAD_INPUT
    assert "--precision fp32" in capsys.readouterr().err
    assert main([*command, "--precision", "fp32"]) == DONE
    scored = json.loads(capsys.readouterr().out)
    assert scored["precision"] == "fp32"
    assert main(["evaluate", "tiny", "--runs-dir", str(runs), "--device", "cpu", "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["metrics"] == scored["metrics"]
    assert main([*command, "--precision", "bf16"]) == DONE
    assert json.loads(capsys.readouterr().out)["metrics"] != scored["metrics"]
    assert main([*command, "--precision", "fp17"]) == BAD_INPUT


def test_a_damaged_checkpoint_is_not_used(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    newest = sorted((copy / "tiny" / "checkpoints").glob("step-*"))[-1]
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert generate(capsys, runs, "--prompt", "1", "--checkpoint", "latest")["step"] == 6
    assert generate(capsys, copy, "--prompt", "1", "--checkpoint", "latest")["step"] < 6


def test_evaluating_again_gives_the_runs_own_score(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "tiny", "--runs-dir", str(runs), "--checkpoint", "6", "--device", "cpu", "--json"]
    assert main(command) == DONE
    said = json.loads(capsys.readouterr().out)["metrics"]
    outcome = json.loads((runs / "tiny" / "outcome.json").read_text())["metrics"]
    if outcome["val/tokens"] == said["val/tokens"]:
        assert said["val/loss"] == pytest.approx(outcome["val/loss"], rel=1e-5)
    assert main(["evaluate", "tiny", "--runs-dir", str(runs), str(PROJECT / "ARCHITECTURE.md"), "--json"]) == DONE
    other = json.loads(capsys.readouterr().out)["metrics"]
    assert other["val/loss"] > said["val/loss"] + 0.1 and other["val/tokens"] > 1000


# ---- the session ------------------------------------------------------------------------------------------------


def echo(prompt: str, settings: Mapping[str, Any]) -> Iterator[str]:
    yield f"<{prompt}@{settings['temperature']}/{settings['seed']}>"


SETTINGS = {
    "max_tokens": 5,
    "temperature": 0.8,
    "top_k": None,
    "top_p": None,
    "repetition_penalty": 1.0,
    "stop": (),
    "seed": 1,
}


def session(lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    Chat(echo, SETTINGS, terminal=False).run()
    return capsys.readouterr().out


def test_a_session_writes_sets_and_remembers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = session("a\n/set temperature=0.5\nb\n/history\n/quit\nnever\n", monkeypatch, capsys)
    assert "a<a@0.8/1>" in said and "b<b@0.5/2>" in said
    assert "[1] a<a@0.8/1>" in said and "[2] b<b@0.5/2>" in said
    assert "never" not in said


def test_a_session_survives_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = session("/set heat=3\n/set top_k=many\n/set temperature=-1\n/nope\n/more\nstill here\n", monkeypatch, capsys)
    assert "still here<still here@0.8/1>" in said and "/nope" in said and "no text yet" in said


def test_settings_read_back_as_they_are_shown() -> None:
    assert setting("top_k=5", SETTINGS) == ("top_k", 5)
    assert setting("top-p = 0.9", SETTINGS) == ("top_p", 0.9)
    assert setting("stop=\\n\\n", SETTINGS) == ("stop", ("\n\n",))
    assert setting("top_k=none", SETTINGS) == ("top_k", None)
    assert shown(("\n\n",)) == "\\n\\n" and shown(None) == "none"
    for wrong in ("top_k=1.5", "max_tokens=none", "top_p=2", "temperature=nan", "seed=-1", "=3", "temperature"):
        with pytest.raises(UserError):
            setting(wrong, SETTINGS)


def command(runs: Path) -> list[str]:
    return [sys.executable, "-m", "orchestrator", "generate", "tiny", "--runs-dir", str(runs), "--max-tokens", "10"]


def test_a_piped_session_answers_every_line(runs: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    lines = "1 b\n/set max_tokens=3\n2 b\n/quit\n"
    done = subprocess.run(
        [*command(runs), "--interactive"],
        input=lines,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == DONE and done.stderr == ""
    assert "1 b" in done.stdout and "2 b" in done.stdout and "max_tokens=3" in done.stdout


def test_a_terminal_without_a_prompt_is_a_session(runs: Path) -> None:
    """Through a real pseudo-terminal: a prompt, Ctrl-C at the prompt, /help, Ctrl-D."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        command(runs), stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
        preexec_fn=as_from_a_terminal,
    )  # fmt: skip
    os.close(terminal)
    try:
        read_until(controller, "/quit to leave.\r\n> ")
        os.write(controller, b"7 bot\n")
        read_until(controller, "\r\n> ")
        # Python sees a signal that comes between the prompt and its wait for input only at the next one
        read_until(controller, "/quit or Ctrl-D leaves", nudge=b"\x03")
        os.write(controller, b"/help\n")
        read_until(controller, "/history")
        assert leaves(process, controller) == DONE
    finally:
        process.kill()
        os.close(controller)


def leaves(process: subprocess.Popen[bytes], descriptor: int) -> int | None:
    """The exit code after Ctrl-D, typed until it is noticed: one that comes while the line editor starts is lost."""
    for _ in range(60):
        os.write(descriptor, b"\x04")
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1)
    return None


def as_from_a_terminal() -> None:
    """In a new process: standard input is its terminal, and Ctrl-C reaches it, also where the tests run behind `&`."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(descriptor: int, expected: str, *, nudge: bytes = b"") -> str:
    """What the session wrote up to `expected`; `nudge` is typed again for every second of silence."""
    seen, deadline = "", time.monotonic() + 60
    readable = select.poll()  # select() itself refuses descriptors from 1,024 on
    readable.register(descriptor, select.POLLIN)
    while expected not in seen:
        assert time.monotonic() < deadline, repr(seen)
        os.write(descriptor, nudge)
        if readable.poll(1000):
            seen += os.read(descriptor, 65536).decode("utf-8", "replace")
    return seen
