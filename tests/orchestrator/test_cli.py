"""Laws of the command line: exit codes, one message and no traceback for bad input, nothing heavy for a question."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import BAD_INPUT, DONE, INTERNAL, main
from trainers.config_io import build_config, dump_yaml, load_yaml
from trainers.presets import PRESETS

PROJECT = Path(__file__).parents[2]
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 200


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORCHESTRATE_RUNS", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "orchestrator", *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=environment, timeout=120, check=False
    )


# ---- bad input ------------------------------------------------------------------------------------------

BAD = {
    "unknown verb": (["trian"], "Did you mean 'train'"),
    "unknown option": (["train", "--nmae", "x"], "--nmae"),
    "option without its value": (["train", "--name"], "--name"),
    "not a number": (["train", "--workers", "two"], "--workers"),
    "unknown preset": (["train", "fundamentallm/smal"], "fundamentallm/small"),
    "unknown key": (["show", "fundamentallm/small", "model.dropuot=0"], "model.dropout"),
    "unknown precision": (["show", "--precision", "fp8"], "fp8"),
    "heads do not divide": (["show", "fundamentallm/small", "model.d_model=130"], "128"),
    "a second target": (["show", "fundamentallm/small", "fundamentallm/large"], "fundamentallm/large"),
    "said twice": (["show", "--seed", "1", "seed=2"], "more than once"),
    "no value": (["show", "budget.steps="], "budget.steps"),
    "missing yaml": (["train", "mine.yaml"], "mine.yaml"),
    "a text as configuration": (["train", "text.txt"], "--data text.txt"),
    "a folder as target": (["train", "."], "--data"),
    "relative budget of a preset": (["train", "fundamentallm/small", "budget.steps=+5"], "budget.steps=5"),
    "name leads out": (["train", "--name", "../x"], "../x"),
    "name with a line break": (["train", "--name", "a\nb"], "name"),
    "name of 300 characters": (["train", "--name", "n" * 300], "300"),
    "name of a device": (["train", "--name", "CON"], "CON"),
    "name begins with a dash": (["train", "--name=-x"], "name"),
    "empty name": (["train", "--name", ""], "name"),
    "no run to start from": (["train", "--init-from", "nobody"], "nobody"),
    "status of nobody": (["status", "nobody"], "nobody"),
    "status outside": (["status", "../../etc"], "etc"),
    "generate from nobody": (["generate", "nobody", "--prompt", "x"], "nobody"),
    "generate without a run": (["generate"], "RUN"),
    "greedy and top-k": (["generate", "nobody", "--greedy", "--top-k", "5"], "greedy"),
    "two kinds of prompts": (["generate", "nobody", "--prompt", "x", "--prompts-file", "y"], "--prompts-file"),
    "prompts file missing": (["generate", "nobody", "--prompts-file", "none.txt"], "none.txt"),
    "evaluate nobody": (["evaluate", "nobody"], "nobody"),
    "empty corpus name": (["show", "--data", ""], "--data"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_message_and_exit_code_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = BAD[case]
    assert main(arguments) == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert not Path("runs").exists(), "something half-made was left behind"


def test_good_input_is_not_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The negative control of the table above."""
    assert main(["show", "fundamentallm/small", "model.dropout=0", "--seed", "1"]) == DONE
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "text", ["a: [1", "- 1\n- 2\n", "model: 3\n", "preset: a\npreset: b\n", "", "\0", "model: {d_model: x}\n"]
)
def test_a_broken_file_is_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(text, encoding="utf-8")
    code = main(["show", "mine.yaml"])
    err = capsys.readouterr().err
    if text == "":  # an empty mapping would be all defaults: either reading is one clear answer
        assert code in (DONE, BAD_INPUT)
    else:
        assert code == BAD_INPUT
        assert "Traceback" not in err and "error:" in err


def test_a_bug_of_ours_goes_to_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import orchestrator.runs

    def broken(runs_dir: Path) -> list[object]:
        raise ZeroDivisionError("sums of nothing")

    monkeypatch.setattr(orchestrator.runs, "find_runs", broken)
    assert main(["runs"]) == INTERNAL
    err = capsys.readouterr().err
    assert "Traceback" not in err
    log = Path(err.split("the details are in ")[1].split(";")[0])
    assert "sums of nothing" in log.read_text(encoding="utf-8")


def test_an_unwritable_place_is_the_persons_to_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    import orchestrator.runs

    def full(runs_dir: Path) -> list[object]:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    monkeypatch.setattr(orchestrator.runs, "find_runs", full)
    assert main(["runs"]) == BAD_INPUT
    assert "/somewhere: No space left on device" in capsys.readouterr().err


def test_ctrl_c_says_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import orchestrator.runs

    def interrupted(runs_dir: Path) -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(orchestrator.runs, "find_runs", interrupted)
    assert main(["runs"]) == 130
    assert capsys.readouterr().err == "stopped: by Ctrl-C.\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m orchestrator show codelm/large | true; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (DONE, "")


# ---- what answers at once -----------------------------------------------------------------------------------

HEAVY = ("torch", "ray", "mlflow", "numpy", "pandas", "matplotlib")
PROBE = """
import sys
from orchestrator.cli import main
code = main({arguments!r})
print("HEAVY", sorted(name for name in {heavy!r} if name in sys.modules), code)
"""


def heavy_after(arguments: list[str]) -> str:
    probe = PROBE.format(arguments=arguments, heavy=HEAVY)
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["presets"],
        ["show", "codelm/large"],
        ["runs"],
        ["trian"],
        ["generate", "nobody"],
    ],
    ids=" ".join,
)
def test_a_question_imports_nothing_heavy(arguments: list[str]) -> None:
    assert heavy_after(arguments).startswith("HEAVY []")


def test_the_probe_sees_what_is_heavy() -> None:
    """Negative control: the plan counts parameters with torch, and the probe says so."""
    assert "torch" in heavy_after(["plan", "fundamentallm/tiny", "--data", "text.txt", "--json"])


def test_what_a_training_may_be_told_is_found_where_a_person_looks() -> None:
    told = run("train", "--help").stdout
    page = (PROJECT / "README.md").read_text()
    for words in ("--precision int8", "--precision int4", "engine=deepspeed", "parallel=fsdp", "--on-oom shrink"):
        assert words in " ".join(told.split()), words
    for words in ("int8", "int4", "engine=deepspeed", "parallel=fsdp", "--on-oom", "--init-from"):
        assert words in page, words
    for linked in (PROJECT / "docs").glob("*.md"):
        assert f"(docs/{linked.name})" in page, f"README.md does not lead to {linked.name}"
    assert all((PROJECT / target).exists() for target in re.findall(r"\]\(([\w./]+)\)", page))


def test_help_lists_every_verb_and_version_is_one_line() -> None:
    done = run("--help")
    assert done.returncode == DONE
    for verb in ("train", "generate", "evaluate", "presets", "show", "plan", "runs", "status"):
        assert f" {verb} " in done.stdout
    version = run("--version")
    assert version.returncode == DONE and version.stdout.startswith("orchestrate ")


# ---- show ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_what_show_prints_is_the_same_configuration(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", preset, "seed=7"]) == DONE
    printed = capsys.readouterr().out
    Path("mine.yaml").write_text(printed, encoding="utf-8")
    assert main(["show", "mine.yaml"]) == DONE
    assert capsys.readouterr().out == printed
    assert build_config(load_yaml(printed)) == PRESETS[preset]().model_copy(update={"seed": 7})


def test_show_as_json_is_the_same_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "fundamentallm/two-phase", "--json"]) == DONE
    assert build_config(json.loads(capsys.readouterr().out)) == PRESETS["fundamentallm/two-phase"]()


def test_presets_as_json_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--json"]) == DONE
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(PRESETS)
    assert all(row["description"] for row in rows)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_closed_formula_counts_as_torch_does(preset: str) -> None:
    from orchestrator.presets_table import closed_form_parameters
    from trainers.models import parameter_count

    model = PRESETS[preset]().model
    vocabulary = model.vocab_size or 97
    assert closed_form_parameters(model, vocabulary) == parameter_count(model, vocabulary)
    variant = model.model_copy(update={"bias": not model.bias, "tie_embeddings": not model.tie_embeddings})
    assert closed_form_parameters(variant, vocabulary) == parameter_count(variant, vocabulary)
    assert closed_form_parameters(variant, vocabulary) != closed_form_parameters(model, vocabulary)


# ---- the target ---------------------------------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["show", *arguments, "--json"]) == DONE, capsys.readouterr().err
    value = json.loads(capsys.readouterr().out)
    assert isinstance(value, dict)
    return value


def test_data_is_absolute_and_replaces_the_text_of_every_phase(capsys: pytest.CaptureFixture[str]) -> None:
    config = build_config(
        shown(capsys, "fundamentallm/two-phase", "--data", "text.txt", "--data", "python-stdlib/prose")
    )
    expected = [str(Path("text.txt").absolute()), "python-stdlib/prose"]
    for phase in config.resolved_phases():
        assert [source.corpus for source in phase.data.sources] == expected
    untouched = build_config(shown(capsys, "fundamentallm/two-phase"))
    assert [source.corpus for source in untouched.resolved_phases()[0].data.sources] != expected


def test_a_ds_config_is_found_from_wherever_the_run_is_continued(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ds.json").write_text("{}")
    shows = shown(capsys, "fundamentallm/tiny", "engine=deepspeed", "deepspeed.config=ds.json")["deepspeed"]
    assert isinstance(shows, dict) and shows["config"] == str(Path("ds.json").absolute())


def test_flags_are_short_for_paths(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--workers", "2", "--precision", "bf16", "--seed", "9", "--device", "cpu", "--text-field", "body"]
    paths = ["workers=2", "precision.compute=bf16", "seed=9", "device=cpu", "data.sources.0.text_field=body"]
    assert shown(capsys, "fundamentallm/small", *flags) == shown(capsys, "fundamentallm/small", *paths)
    assert shown(capsys, "fundamentallm/small", *flags) != shown(capsys, "fundamentallm/small")


def make_run(name: str, *, state: str | None, overrides: tuple[str, ...] = ("budget.steps=100",)) -> Path:
    """A run's folder as far as the command line looks into it."""
    from trainers.config_io import override

    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(override(PRESETS["fundamentallm/tiny"](), list(overrides))))
    (folder / "identity.json").write_text(json.dumps({"name": name, "fingerprint": "0" * 64, "fields": {}}))
    if state is not None:
        (folder / "outcome.json").write_text(json.dumps({"state": state, "reason": "completed", "step": 100}))
    return folder


def test_the_name_of_a_run_is_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("mine", state="finished")
    for target in ("mine", "runs/mine", "./runs/mine/"):
        assert build_config(shown(capsys, target)).budget == build_config({"budget": {"steps": 100}}).budget


def test_adding_to_the_budget_of_a_finished_run(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("mine", state="finished")
    assert shown(capsys, "mine", "budget.steps=+50") == shown(capsys, "mine", "budget.steps=150")


@pytest.mark.parametrize(
    ("state", "change", "expected"),
    [
        (None, "budget.steps=+50", "budget.steps=150"),  # adding twice after a kill would train twice as long
        ("stopped", "budget.steps=+50", "budget.steps=150"),
        ("finished", "budget.epochs=+1", "budget.steps=+N (now 100)"),
        ("finished", "budget.steps=+0", "above 0"),
        ("finished", "budget.steps=+x", "above 0"),
        ("finished", "budget.stesp=+5", "budget.steps=+N"),
        ("finished", "phases.none.budget.steps=+5", "budget.steps=+N"),
    ],
)
def test_adding_where_it_would_mislead_is_refused(
    state: str | None, change: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("mine", state=state)
    assert main(["show", "mine", change]) == BAD_INPUT
    assert expected in capsys.readouterr().err


def test_init_from_is_the_folder_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("mine", state="finished")
    assert shown(capsys, "fundamentallm/tiny", "--init-from", "mine")["init_from"] == str(folder.absolute())


def test_a_warm_up_beyond_the_budget_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    warm = ["fundamentallm/tiny", "budget.steps=50"]
    for steps, expected in (("200", "ends at 25% of optim.lr"), ("50", "")):
        assert main(["show", *warm, f"schedule.warmup_steps={steps}"]) == DONE
        said = capsys.readouterr().err
        assert expected in said and bool(said) is bool(expected)
    epochs = ["fundamentallm/tiny", "--data", "text.txt", "budget.epochs=1"]
    for steps in ("20000", "1"):
        assert main(["plan", *epochs, f"schedule.warmup_steps={steps}"]) == DONE
        assert ("ends at" in capsys.readouterr().out) is (steps == "20000")


def test_train_hands_over_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam to the driver, without starting one."""
    import types

    from orchestrator.experiment import Request
    from trainers.config import RunConfig

    asked: list[tuple[RunConfig, Request]] = []
    driver = types.ModuleType("orchestrator.launch")
    driver.train = lambda config, request: asked.append((config, request)) or 75  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "orchestrator.launch", driver)
    make_run("old", state="finished")

    assert main(["train", "fundamentallm/tiny", "budget.steps=3", "--name", "new", "--fresh", "--seed", "5"]) == 75
    assert main(["train", "old", "budget.steps=+20"]) == 75
    assert main(["train", "old", "--name", "copy"]) == 75
    (first, new), (larger, extended), (_, copy) = asked
    assert first.budget is not None and (first.budget.steps, first.seed) == (3, 5)
    assert new == Request(Path("runs").absolute(), "new", fresh=True)
    assert extended == Request(Path("runs").absolute(), "old")
    assert larger.budget is not None and larger.budget.steps == 120
    assert copy == Request(Path("runs").absolute(), "copy")


def test_ctrl_c_before_the_command_line_is_loaded_is_no_traceback(tmp_path: Path) -> None:
    """A package that is interrupted while it loads stands for the first tenth of a second."""
    early = tmp_path / "early"
    early.mkdir()
    (early / "typer.py").write_text("raise KeyboardInterrupt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(early), str(PROJECT)])}
    command = [sys.executable, "-m", "orchestrator", "--help"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "stopped: by Ctrl-C.\n")
    environment["PYTHONPATH"] = str(PROJECT)
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
