"""Laws of the runs folder: every run is found, no broken or foreign folder disturbs, the state is the true one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import BAD_INPUT, DONE, main
from orchestrator.runs import decide_state, find_runs, last_values, lines_backwards, name_in, run_folder, total_steps
from trainers.claim import Claim
from trainers.config_io import dump_yaml, override
from trainers.errors import UserError
from trainers.presets import PRESETS

TINY = override(PRESETS["fundamentallm/tiny"](), ["budget.steps=40"])


def make_run(folder: Path, *, outcome: object = None, rows: int = 3) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(TINY))
    (folder / "identity.json").write_text(json.dumps({"fingerprint": "a" * 64, "fields": {}, "mlflow_run_id": "m1"}))
    with (folder / "metrics.jsonl").open("w") as record:
        for step in range(1, rows + 1):
            row = {"step": step, "tokens": step * 8, "time_ms": 1, "phase": "main", "train/loss": 4.0 - step / 10}
            record.write(json.dumps(row) + "\n")
        if rows:
            record.write(json.dumps({"step": 2, "tokens": 16, "time_ms": 1, "phase": "main", "val/loss": 3.5}) + "\n")
    if outcome is not None:
        (folder / "outcome.json").write_text(outcome if isinstance(outcome, str) else json.dumps(outcome))
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORCHESTRATE_RUNS", raising=False)
    return tmp_path / "runs"


def states(runs: Path) -> dict[str, str]:
    return {run.name: run.state for run in find_runs(runs)}


def test_every_run_is_found_with_its_state(runs: Path) -> None:
    make_run(runs / "done", outcome={"state": "finished", "reason": "completed", "step": 3})
    make_run(runs / "paused", outcome={"state": "stopped", "reason": "SIGINT", "step": 3})
    make_run(runs / "broke", outcome={"state": "failed", "reason": "loss is not finite", "step": 3})
    make_run(runs / "killed")
    make_run(runs / "sweep" / "trial-1", outcome={"state": "finished", "reason": "completed", "step": 3})
    with Claim.acquire(make_run(runs / "live", outcome={"state": "stopped", "reason": "SIGINT", "step": 1})):
        assert states(runs) == {
            "done": "finished",
            "paused": "stopped",
            "broke": "failed",
            "killed": "interrupted",
            "sweep/trial-1": "finished",
            "live": "running",
        }
    assert states(runs)["live"] == "stopped", "a claim that was let go must not count as running"


def test_a_holder_that_was_killed_is_not_running(runs: Path) -> None:
    folder = make_run(runs / "killed")
    script = (
        "import os, sys, pathlib; from trainers.claim import Claim;"
        "claim = Claim.acquire(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", script, str(folder)], env=environment, check=False).returncode == -9
    assert states(runs) == {"killed": "interrupted"}


def test_the_newest_values_are_shown(runs: Path) -> None:
    make_run(runs / "done", outcome={"state": "finished", "reason": "completed", "step": 3})
    (run,) = find_runs(runs)
    assert (run.step, run.total_steps, run.train_loss, run.val_loss) == (2, 40, 3.7, 3.5)
    assert run.size_bytes > 0 and run.preset == "fundamentallm/tiny" and run.problem is None


BROKEN = {
    "no config": lambda folder: (folder / "config.yaml").unlink(),
    "config is a list": lambda folder: (folder / "config.yaml").write_text("- 1\n"),
    "config is binary": lambda folder: (folder / "config.yaml").write_bytes(b"\xff\xfe\x00"),
    "config is a folder": lambda folder: ((folder / "config.yaml").unlink(), (folder / "config.yaml").mkdir()),
    "identity is torn": lambda folder: (folder / "identity.json").write_text('{"finger'),
    "identity is a number": lambda folder: (folder / "identity.json").write_text("3"),
    "outcome is torn": lambda folder: (folder / "outcome.json").write_text('{"state": "fin'),
    "outcome is foreign": lambda folder: (folder / "outcome.json").write_text('{"state": "splendid"}'),
    "identity is nested": lambda folder: (folder / "identity.json").write_text("[" * 100_000),
}
HARMLESS = {
    "record is torn": lambda folder: (folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "tr'),
    "record is binary": lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\x00\n" * 9),
    "record is empty": lambda folder: (folder / "metrics.jsonl").write_text(""),
    "claim is torn": lambda folder: (folder / "claim").write_text('{"gen'),
    "values are text": lambda folder: (folder / "metrics.jsonl").write_text('{"step": "x", "train/loss": []}\n'),
}


@pytest.mark.parametrize("damage", [*BROKEN, *HARMLESS])
def test_a_broken_run_disturbs_nobody(damage: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(runs / "sound", outcome={"state": "finished", "reason": "completed", "step": 3})
    folder = make_run(runs / "broken")
    (BROKEN | HARMLESS)[damage](folder)
    assert states(runs) == {"sound": "finished", "broken": "damaged" if damage in BROKEN else "interrupted"}
    for arguments in (["runs"], ["runs", "--json"], ["status", "broken"], ["status", "broken", "--json"]):
        assert main(arguments) == DONE, arguments
        assert "Traceback" not in "".join(capsys.readouterr())


def test_foreign_things_are_no_runs(runs: Path) -> None:
    make_run(runs / "mine")
    make_run(runs / ".cache" / "hidden")
    (runs / "notes.txt").write_text("x")
    (runs / "mlartifacts" / "1").mkdir(parents=True)
    make_run(runs.parent / "elsewhere")
    (runs / "link").symlink_to(runs.parent / "elsewhere")
    (runs / "loop").symlink_to(runs)
    assert set(states(runs)) == {"mine"}
    assert find_runs(runs.parent / "nothing") == []


def test_a_total_is_read_where_it_is_known() -> None:
    assert total_steps({"budget": {"steps": 40}}) == 40
    assert total_steps({"budget": {"epochs": 2}}) is None
    assert total_steps({"budget": {"epochs": 2}}, {"total_steps": 77}) == 77
    assert total_steps({"budget": None, "phases": [{"budget": {"steps": 3}}, {"budget": {"steps": 4}}]}) == 7
    assert total_steps({"budget": {"steps": 5}, "phases": [{"budget": {"steps": 3}}, {"name": "b"}]}) == 8
    assert total_steps({"budget": "many", "phases": 3}) is None


def test_a_live_claim_outranks_everything() -> None:
    assert decide_state(live=True, outcome={"state": "finished"}, readable=False) == "running"
    assert decide_state(live=False, outcome={"state": "finished"}, readable=False) == "damaged"
    assert decide_state(live=False, outcome={}, readable=True) == "interrupted"


@pytest.mark.parametrize("length", [0, 1, 100, 65_535, 65_536, 65_537, 200_000])
def test_lines_backwards_are_the_lines(length: int, tmp_path: Path) -> None:
    lines = [b"x" * (n % 97 + 1) for n in range(length // 50)] + [b"y" * length]
    path = tmp_path / "lines"
    path.write_bytes(b"\n".join(lines))
    assert list(lines_backwards(path)) == [line for line in lines[::-1] if line]


def test_a_loss_that_overflowed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": "nan"}\n')
    assert str(last_values(path, ("train/loss",), [])["train/loss"]) == "nan"


# ---- names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "..",
        ".",
        "",
        "a/../b",
        "/etc",
        "a\nb",
        "a\0b",
        "n" * 300,
        "-x",
        ".x",
        "CON",
        "nul.txt",
        "a b",
        "ä",
        "a/b/c",
        "a//b",
    ],
)
def test_names_that_could_lead_elsewhere_are_refused(name: str, runs: Path) -> None:
    with pytest.raises(UserError):
        run_folder(runs, name)


@pytest.mark.parametrize("name", ["first-run", "a", "0", "A.b_c-1", "n" * 128, "sweep/trial-1", "console"])
def test_good_names_stay_inside(name: str, runs: Path) -> None:
    assert run_folder(runs, name) == runs / name


def test_a_linked_run_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(runs.parent / "elsewhere")
    runs.mkdir()
    (runs / "link").symlink_to(runs.parent / "elsewhere")
    assert main(["status", "link"]) == BAD_INPUT
    assert "link" in capsys.readouterr().err


def test_a_path_into_the_folder_is_a_name(runs: Path) -> None:
    assert name_in(runs, "runs/first-run/") == "first-run"
    assert name_in(runs, str(runs / "sweep" / "t1")) == "sweep/t1"
    assert name_in(runs, "first-run") == name_in(runs, "first-run/") == "first-run"
    assert name_in(runs, "elsewhere/first-run") == "elsewhere/first-run"


# ---- status -----------------------------------------------------------------------------------------------------


def test_status_says_who_holds_it_and_how_to_go_on(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(runs / "mine", outcome={"state": "stopped", "reason": "SIGTERM", "step": 3, "tokens": 24})
    assert main(["status", "mine", "--json"]) == DONE
    said = json.loads(capsys.readouterr().out)
    assert said["next"] == "orchestrate train mine" and said["holder"] is None and said["mlflow_run_id"] == "m1"
    with Claim.acquire(folder):
        assert main(["status", "mine", "--json"]) == DONE
        assert json.loads(capsys.readouterr().out)["holder"]["pid"] == os.getpid()


def test_status_names_a_checkpoint_that_lost_a_file(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(runs / "mine")
    for step in (1, 2):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"12345")
        manifest = {"files": {"model.safetensors": {"size": 5, "sha256": "0" * 64}}}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (checkpoint / "model.safetensors").unlink()
    assert main(["status", "mine", "--json"]) == DONE
    sound, damaged = json.loads(capsys.readouterr().out)["checkpoints"]
    assert sound["problem"] is None and damaged["problem"] == "model.safetensors is missing"
