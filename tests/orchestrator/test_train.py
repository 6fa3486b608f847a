"""Laws of `orchestrate train` as a person meets it: one command is one run; what is wrong is said before Ray starts.

What may start Ray is a process of its own. What must not is typed into this process, where starting Ray would show.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.cli import main
from tests.orchestrator.faults import STEPS, Place, assert_told_once, claim_of, left, read, tracked
from tests.trainers.crash import Ending, merged
from trainers.process import Process

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

Capture = pytest.CaptureFixture[str]


class Typist:
    """Types `orchestrate train` in this process, where Ray cannot start."""

    def __init__(self, place: Place, capsys: Capture):
        self.place = place
        self.capsys = capsys

    def __call__(self, *arguments: str, code: int = 2) -> str:
        """What the command said, having ended with `code`."""
        found = main(["train", *arguments, "--runs-dir", str(self.place.runs)])
        said = "".join(self.capsys.readouterr())
        assert found == code, said
        assert "Traceback" not in said
        return said

    def config(self, name: str, *arguments: str, code: int = 2) -> str:
        """The place's configuration under `name`."""
        return self(str(self.place.config), "--name", name, *arguments, code=code)


@pytest.fixture
def typed(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Typist:
    def ray_cluster(*_: object, **__: object) -> None:
        raise AssertionError("Ray would start")

    monkeypatch.setattr("orchestrator.launch.ray_cluster", ray_cluster)
    return Typist(place, capsys)


def listing(folder: Path) -> set[Path]:
    """Everything below, but for what runs of a folder share."""
    shared = {folder / ".cache", *folder.glob("mlflow.db*"), *folder.glob(".mlflow.db*"), folder / "mlartifacts"}
    return {path for path in folder.rglob("*") if not shared & {path, *path.parents}}


# ---- one run, one command ----------------------------------------------------------------------------------------


def test_a_live_run_is_refused_to_a_second_terminal(place: Place, typed: Typist) -> None:
    command = place.start("busy")
    command.wait_for_step(1)
    said = typed.config("busy")
    assert str(command.pid) in said and Process.current().host in said and "in use" in said
    command.interrupt()
    command.expect(75)
    assert claim_of(command.run_dir).generation == 1, "the refused command took the claim"


def test_a_finished_run_is_said_to_be_finished(place: Place, one_worker: Ending, typed: Typist) -> None:
    run_dir = place.runs / "alone"
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    said = typed.config("alone", code=0)
    assert "finished" in said and "checkpoint" in said and "orchestrate generate" in said
    report = json.loads(typed.config("alone", "--json", code=0))
    assert (report["state"], report["step"]) == ("finished", STEPS)
    assert Path(report["checkpoint"]).is_dir() and Path(report["plots"]).is_dir() and report["sample_text"]
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    assert left(run_dir) == one_worker


def test_another_configuration_under_the_same_name_is_refused_field_by_field(
    place: Place, one_worker: Ending, typed: Typist
) -> None:
    before = listing(place.runs)
    said = typed.config("alone", "optim.lr=0.01", "model.dropout=0")
    assert "optim.lr: 0.003 -> 0.01" in said and "model.dropout: 0.1 -> 0" in said
    assert "--fresh" in said and "alone-2" in said
    assert "budget" not in said
    assert "workers: 1 -> 2" in typed.config("alone", "--workers", "2")
    assert listing(place.runs) == before
    typed.config(
        "alone", "logging.every_steps=7", "checkpoint.every_steps=99", code=0
    )  # these do not change the result


def test_text_that_changed_since_is_refused(place: Place, one_worker: Ending, typed: Typist) -> None:
    text = place.text.read_text()
    try:
        place.text.write_text(text.replace("cat", "dog", 1))
        said = typed.config("alone")
    finally:
        place.text.write_text(text)
    assert "data" in said and "alone" in said
    typed.config("alone", code=0)


def test_a_budget_cannot_be_raised_where_the_past_would_be_another(place: Place, typed: Typist) -> None:
    """Refused with the reason, and the run stays as it was. (test_faults raises one that may be raised.)"""
    phases = write_phases(place)
    cases: list[tuple[str, list[str], str, str]] = [
        ("cosine", [str(place.config), "schedule.kind=cosine"], "budget.steps", "learning rate"),
        ("past", [str(phases)], "phases.prose.budget.steps", "only the last phase"),
    ]
    for name, target, budget, why in cases:
        typed(*target, "--name", name, code=1)  # as far as Ray: the run has its identity now
        before = listing(place.runs)
        said = typed(*target, "--name", name, f"{budget}={STEPS + 40}")
        assert why in said and "new run" in said
        assert listing(place.runs) == before
    typed(str(phases), "--name", "past", f"phases.code.budget.steps={STEPS + 40}", code=1)  # goes on to Ray


# ---- phases --------------------------------------------------------------------------------------------------------


def write_phases(place: Place) -> Path:
    """The place's configuration in two phases of 30 and 50 steps."""
    config = place.config.with_name("phases.yaml")
    config.write_text(
        place.config.read_text().replace(f"budget: {{steps: {STEPS}}}", "budget: null")
        + "phases: [{name: prose, budget: {steps: 30}}, {name: code, budget: {steps: 50}, hand_over: optimizer}]\n"
    )
    return config


def test_a_run_of_two_phases_is_one_curve_and_two_slices(place: Place) -> None:
    command = place.run("phases", target=write_phases(place)).expect(0)
    whole = assert_told_once(place.runs, command.run_dir)
    slices = read(command.run_dir, "identity.json")["mlflow_phase_run_ids"]
    assert list(slices) == ["prose", "code"]
    ranges = {"prose": range(1, 31), "code": range(31, 81)}
    rows = merged(left(command.run_dir).rows)
    for name, run_id in slices.items():
        told = tracked(place.runs, run_id)
        assert told.status == "FINISHED" and told.tags["mlflow.parentRunId"] == whole.run_id
        losses = {step: values for (step, key), values in told.history.items() if key == "train/loss"}
        assert losses == {step: [rows[step, "train/loss"]] for step in ranges[name]}


# ---- nothing half-made -----------------------------------------------------------------------------------------------


def test_a_store_out_of_reach_is_said_before_the_first_step(place: Place) -> None:
    before = listing(place.runs) if place.runs.exists() else set()
    command = place.run("nowhere", MLFLOW_TRACKING_URI="http://127.0.0.1:9").expect(2)
    assert "MLFLOW_TRACKING_URI" in command.output and "Traceback" not in command.output
    assert listing(place.runs) == before


BAD_TEXT = {
    "missing": None,
    "empty": b"",
    "three bytes": b"abc",
    "binary": bytes(range(256)) * 40,
    "wrongly encoded": "gr\u00fc\u00df dich ".encode("latin-1") * 400,
    "shorter than one sequence": b"a few words",
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text_leaves_nothing_behind(case: str, place: Place, typed: Typist, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if (data := BAD_TEXT[case]) is not None:
        path.write_bytes(data)
    before = listing(place.runs) if place.runs.exists() else set()
    said = typed.config("bad-text", "--data", str(path))
    assert "text.txt" in said
    assert listing(place.runs) == before if place.runs.exists() else not before


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b/c", "a\nb", "n" * 300, "CON", "-x", "..", "a\0b", ""])
def test_a_name_leads_nowhere_else(name: str, place: Place, typed: Typist) -> None:
    around = place.runs.parent
    before = listing(around)
    said = typed(str(place.config), f"--name={name}")
    assert "name" in said
    assert listing(around) == before


def test_a_linked_folder_is_no_run(place: Place, typed: Typist, tmp_path: Path) -> None:
    place.runs.mkdir(exist_ok=True)
    (place.runs / "linked").symlink_to(tmp_path)
    try:
        assert "link" in typed.config("linked")
        assert not any(tmp_path.iterdir())
    finally:
        (place.runs / "linked").unlink()


def test_control_good_text_under_a_good_name_would_start_ray(place: Place, typed: Typist) -> None:
    assert "Ray would start" in typed.config("good", code=1)
