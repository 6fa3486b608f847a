"""Laws of bad input to `orchestrate tune`, through the command line: exit code 2, one message, nothing left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestrator.cli import DONE, main
from orchestrator.sweeps import driver
from orchestrator.sweeps.journal import JOURNAL
from tests.orchestrator.refusals import ReachedRay, refused, without_ray

TINY = ["tune", "fundamentallm/tiny", "--data", "text.txt", "--runs-dir", "runs"]
LR = ["--set-space", "optim.lr=log(1e-4,1e-2)"]


@pytest.fixture(autouse=True)
def before_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(driver, tmp_path, monkeypatch)


def left_behind(folder: Path) -> list[str]:
    """All but the shared cache of packed text."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    return [str(path) for path in files if ".cache" not in path.parts]


CASES: dict[str, tuple[list[str], str]] = {
    "an unknown space": (["--space", "lr_bacth"], "Did you mean lr_batch?"),
    "an unknown path": (["--set-space", "optim.learning_rate=log(1e-4,1e-2)"], "did you mean `optim.lr`"),
    "a missing file": (["--space", "mine.yaml"], "mine.yaml"),
    "an empty choice": (["--set-space", "batch.sequences=[]"], "batch.sequences"),
    "low above high": (["--set-space", "optim.lr=log(1e-2,1e-4)"], "0.01"),
    "the logarithm of 0": (["--set-space", "optim.lr=log(0,1e-2)"], "optim.lr"),
    "no domain": (["--set-space", "optim.lr=fast"], "optim.lr"),
    "an illegal value": (["--set-space", "optim.lr=[-1,1e-3]"], "optim.lr"),
    "a seed": (["--set-space", "seed=[1,2,3]"], "--seeds"),
    "a fixed vocabulary": (["--set-space", "tokenizer.kind=[bytes,characters]"], "tokenizer"),
    "no trials": ([*LR, "--trials", "0"], "--trials must be at least 1"),
    "fewer than none": ([*LR, "--trials", "-3"], "--trials"),
    "no seeds": ([*LR, "--seeds", "0"], "--seeds"),
    "an unknown metric": ([*LR, "--objective", "val/f1"], "never reported"),
    "an unknown way": ([*LR, "--objective", "val/loss:best"], "--objective"),
    "two objectives": ([*LR, "--objective", "val/loss", "--objective", "mem/peak_gib"], "--searcher"),
    "one of several": ([*LR, "--searcher", "multi"], "several objectives"),
    "nothing to share": (["--space", "task_weights"], "task_weights"),
    "one phase": (["--space", "phase_lengths"], "two-phase"),
    "fp16 on a CPU": (["--set-space", "precision=[fp32,fp16]", "--device", "cpu"], "fp16"),
    "int4 without a run to start from": (["--set-space", "precision=[fp32,int4]", "--device", "cpu"], "int4"),
    "a population of three": ([*LR, "--scheduler", "pbt", "--trials", "3", "--searcher", "random"], "at least 4"),
    "a population of batches": (["--space", "lr_batch", "--scheduler", "pbt", "--searcher", "random"], "cannot change"),
    "a population with workers": ([*LR, "--scheduler", "pbt", "--searcher", "random", "--workers", "2"], "--workers 1"),
    "a population trained on": (
        [*LR, "--scheduler", "pbt", "--searcher", "random", "--then-train"],
        "--then-train trains from scratch",
    ),
    "more CPUs than there are": ([*LR, "--cpus-per-trial", "64000"], "could never start"),
    "no time": ([*LR, "--max-time", "soon"], "--max-time is a time such as"),
    "time backwards": ([*LR, "--max-time", "-5m"], "--max-time"),
    "no tokens": ([*LR, "--max-tokens", "0"], "--max-tokens must be at least 1"),
    "no GPU-hours": ([*LR, "--max-gpu-hours", "0"], "--max-gpu-hours must be above 0"),
    "nobody at a time": ([*LR, "--concurrent", "0"], "--concurrent must be at least 1"),
    "a share of no GPU": ([*LR, "--gpus-per-trial", "-0.5"], "--gpus-per-trial must be above 0"),
    "grace beyond the budget": ([*LR, "--grace", "999999999"], "grace"),
    "a name that leads elsewhere": ([*LR, "--name", "../elsewhere"], "a run name is"),
    "a text that is not there": ([*LR, "--data", "txet.txt"], "txet.txt"),
    "an epoch of nothing": ([*LR, "budget.steps=0"], "budget.steps"),
    "a grid of no points": ([*LR, "--searcher", "grid", "--grid-points", "0"], "grid"),
    "a grid beyond memory": ([*LR, "--searcher", "grid", "--grid-points", "1000000000"], "at most 100,000"),
    "a grid beyond any sweep": (
        [*LR, "--set-space", "model.dropout=uniform(0,0.3)", "--searcher", "grid", "--grid-points", "1000"],
        "--grid-points 1000",
    ),
    "a number in quotes": (["--set-space", "batch.sequences=[8,'16']"], '"16" is taken for 16'),
    "a number for a switch": (["--set-space", "model.bias=[0,1]"], "write false"),
    "an axis twice": ([*LR, *LR], "optim.lr: given twice"),
    "a folder for a space": (["--space", "."], "is a folder. Name a YAML file"),
    "a device for a space": (["--space", "/dev/zero"], "no regular file"),
    "an objective of no way": ([*LR, "--objective", "val/loss:"], "got ''"),
    "an objective twice": (
        [*LR, "--searcher", "multi", "--objective", "val/loss", "--objective", "val/loss:max"],
        "val/loss is given twice",
    ),
    "a population never asked": (
        [*LR, "--scheduler", "pbt", "--searcher", "random", "--evaluations", "1"],
        "--evaluations 1",
    ),
    "time without end": ([*LR, "--max-time", "9" * 400], "--max-time is a time such as"),
    "memory without end": ([*LR, "--memory-limit", f"{'9' * 400}GiB"], "--memory-limit is an amount"),
    "grace beyond counting": ([*LR, "--grace", str(10**30)], "--grace: must be less than"),
    "the store's own name": ([*LR, "--name", "mlflow.db"], "MLflow store"),
    "a batch beyond the text": (["--set-space", "batch.sequences=[8,4096]"], "batch.sequences=4096 of the space"),
    "tokens beyond counting": ([*LR, f"budget.steps={2**63 - 1}"], "more than 64 bits count"),
    "a rule for a batch that stays": ([*LR, "--lr-rule", "sqrt"], "leave --lr-rule out"),
    "GPU-hours of a CPU": ([*LR, "--device", "cpu", "--max-gpu-hours", "1"], "--max-gpu-hours 1 would bound nothing"),
    "trials in words": ([*LR, "--trials", "many"], "it must be a valid integer, got 'many'"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_message_and_leaves_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, part = CASES[case]
    typed = [word for word in TINY if not ("--data" in arguments and word in ("--data", "text.txt"))]
    assert part in refused([*typed, *arguments], capsys)
    assert left_behind(tmp_path / "runs") == []
    assert left_behind(tmp_path) == ["text.txt"]


def test_a_pipe_for_a_space_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "no regular file" in refused([*TINY, "--space", "pipe.yaml"], capsys)


def test_a_dry_run_refuses_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ("an unknown space", "no trials", "an unknown metric", "grace beyond the budget", "a population of three")
    cases += ("a batch beyond the text", "tokens beyond counting")
    for case in (*cases, "a population trained on", "more CPUs than there are"):
        arguments, part = CASES[case]
        assert part in refused([*TINY, *arguments, "--dry-run"], capsys)
    assert "Leave --gpus-per-trial out, and say --device cpu." in refused(
        [*TINY, *LR, "--gpus-per-trial", "1e6", "--dry-run"], capsys
    )
    said = refused([*TINY, *LR, "--memory-limit", "1KiB", "--dry-run"], capsys)
    assert "is needed, and 942 B may be used" in said
    assert left_behind(tmp_path) == ["text.txt"]


def test_good_input_reaches_ray_and_leaves_nothing_when_that_fails(tmp_path: Path) -> None:
    """Negative control of all of the above."""
    with pytest.raises(ReachedRay):
        main([*TINY, *LR, "--name", "first"])
    assert not (tmp_path / "runs" / "first").exists()


# ---- names that are taken -------------------------------------------------------------------------------------------


def begun(name: str, *arguments: str) -> Path:
    """A sweep's folder as a command leaves it that was killed once it had asked for a trial."""
    with pytest.raises(ReachedRay):
        main([*TINY, "--name", name, *arguments])
    return Path("runs") / name


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep over the learning rate with two trials that has asked for one."""
    with monkeypatch.context() as kept:
        kept.setattr(driver, "_holds_something", lambda sweep: True)
        folder = begun("first", *LR, "--trials", "2")
    (folder / JOURNAL).write_text('{"event":"asked","trial":0,"params":{"optim.lr":0.001},"time_ms":1}\n')
    return folder


def test_a_used_name_is_refused_with_what_differs(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file() and path.name != "claim"}
    for arguments, part in (
        (
            ["--set-space", "optim.lr=log(1e-4,1e-1)", "--trials", "2"],
            "optim.lr: log 0.0001 .. 0.01 -> log 0.0001 .. 0.1",
        ),
        ([*LR, "--trials", "2", "--scheduler", "none"], "sweep.scheduler"),
        ([*LR, "--trials", "2", "model.dropout=0.5"], "model.dropout: 0.1 -> 0.5"),
        ([*LR, "--trials", "1"], "--trials 2 or more"),
    ):
        assert part in refused([*TINY, "--name", "first", *arguments], capsys)
        assert part in refused([*TINY, "--name", "first", *arguments, "--dry-run"], capsys)
    after = {path: path.read_bytes() for path in first.rglob("*") if path.is_file() and path.name != "claim"}
    assert after == before


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A begun sweep whose space, written out, is far longer than a line; the options that make it."""
    axes = [f"model.{name}={domain}" for name, domain in WIDE.items()]
    words = [word for axis in ["optim.lr=log(1e-4,1e-2)", *axes] for word in ("--set-space", axis)]
    with monkeypatch.context() as kept:
        kept.setattr(driver, "_holds_something", lambda sweep: True)
        begun("wide", *words, "--trials", "2")
    return words


WIDE = {"dropout": "uniform(0.0,0.3)", "n_layers": "[1,2,3]", "bias": "[true,false]"}


def test_another_space_is_shown_path_by_path(wide: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Only what differs, each domain as it is written elsewhere, and no JSON that is cut short of the difference."""
    *first, last = wide
    other = [*first, last.replace("true,false", "false,true")]
    said = refused([*TINY, "--name", "wide", "--trials", "2", *other], capsys)
    assert "model.bias: one of True, False -> one of False, True" in said
    assert "optim.lr" not in said and "{" not in said and "sweep.space" not in said
    gone = refused([*TINY, "--name", "wide", "--trials", "2", *first[:-1]], capsys)
    assert "model.bias: one of True, False -> (not set)" in gone
    turned = [word for pair in reversed(list(zip(wide[::2], wide[1::2], strict=True))) for word in pair]
    order = refused([*TINY, "--name", "wide", "--trials", "2", *turned], capsys)
    assert "the space's order: optim.lr, model.dropout" in order
    with pytest.raises(ReachedRay):  # the control: the same space goes on
        main([*TINY, "--name", "wide", "--trials", "2", *wide])


def test_a_runs_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "identity.json").write_text(json.dumps({"fingerprint": "a" * 64, "fields": {}}))
    assert "name of a run" in refused([*TINY, "--name", "mine", *LR], capsys)


def test_a_batch_beyond_the_budget_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Trials of it train on more than the others. The control: at two steps they do not."""
    for steps, told in ((1, True), (2, False)):
        more = ["--set-space", "batch.sequences=[8,16]", f"budget.steps={steps}", "--dry-run", "--json"]
        assert main([*TINY, *more]) == DONE
        notes = json.loads(capsys.readouterr().out)["notes"]
        assert any("one step of batch.sequences=16 takes 512 tokens" in note for note in notes) is told


@pytest.mark.parametrize("content", [None, "{", "[]", '{"fields": {}}'])
def test_a_damaged_sweep_is_not_begun_anew(
    content: str | None, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its trials would be taken for those of another space."""
    trials = (first / JOURNAL).read_bytes()
    (first / "sweep.json").unlink()
    if content is not None:
        (first / "sweep.json").write_text(content)
    for more in ([], ["--dry-run"]):
        assert "is damaged" in refused([*TINY, "--name", "first", *LR, "--trials", "2", *more], capsys)
    assert (first / JOURNAL).read_bytes() == trials
    assert (first / "sweep.json").exists() == (content is not None)


def test_a_sweeps_name_is_refused_to_a_run(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "fundamentallm/tiny", "--data", "text.txt", "--runs-dir", "runs", "--name", "first"]
    for more in ([], ["--dry-run"]):
        assert "name of a sweep" in refused([*train, *more], capsys)


def test_a_sweep_among_the_runs_is_no_damaged_run(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where its files are torn: then it is a damaged sweep, and the others are shown."""
    assert main(["runs", "--runs-dir", "runs", "--json"]) == DONE
    [line] = json.loads(capsys.readouterr().out)
    assert (line["kind"], line["state"], line["step"], line["total_steps"]) == ("sweep", "stopped", 0, 2)
    assert main(["status", "first", "--runs-dir", "runs"]) == DONE
    assert "0/2" in capsys.readouterr().out
    for name, content in (
        ("sweep.json", "{"),
        ("sweep.jsonl", "{}\n"),
        ("sweep.jsonl", '{"event":"ended","trial":7}\n'),
    ):
        whole = (first / name).read_text()
        (first / name).write_text(content)
        assert main(["runs", "--runs-dir", "runs", "--json"]) == DONE
        [line] = json.loads(capsys.readouterr().out)
        assert line["state"] == "damaged" and name in line["problem"]
        assert main(["runs", "--runs-dir", "runs"]) == DONE
        assert main(["status", "first", "--runs-dir", "runs"]) == DONE
        capsys.readouterr()
        (first / name).write_text(whole)
