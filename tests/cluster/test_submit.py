"""Laws of `orchestrate submit` that need no cluster: what is refused here, what a job is told, what its end means."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cluster.submit
from cluster.errors import SubmissionError
from cluster.follow import Ending, Output, ending
from cluster.parcel import Parcel
from cluster.submit import Job, checked_address
from orchestrator.cli import BAD_INPUT, main
from orchestrator.verbs.checked import check
from orchestrator.verbs.cluster import submit
from search_spaces import precisions
from trainers.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SENT = "orchestrate submit --address"
NOBODY = "http://127.0.0.1:1"
SPACE = "optim.lr: log(1e-5, 1e-3)\n"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a token, and nothing else of Ray in the environment."""
    for name in [name for name in os.environ if name.startswith(("RAY_", "ORCHESTRATE_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "token").write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # set by the verb too: here so that it is undone
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    (project / "small.txt").write_text("It was a bright cold day in April.\n" * 50)
    (project / "ignored.txt").write_text("It was a bright cold day in April.\n" * 50)
    (project / "good.yaml").write_text("data: {sources: [{corpus: small.txt}]}\n")
    (project / "bad.yaml").write_text("data: {sources: [{corpus: ignored.txt}]}\n")
    (project / "ignored.yaml").write_text("data: {sources: [{corpus: small.txt}]}\n")
    (project / "my.yaml").write_text(SPACE)
    (project / "ignored.space").write_text(SPACE)
    (project / "code.py").write_text("")
    (project / ".rayignore").write_text("ignored.*\n")
    (tmp_path / "outside.txt").write_text("It was a bright cold day in April.\n" * 50)


# ---- bad input -------------------------------------------------------------------------------------------

BAD = {
    "unknown verb": (["--", "trian"], "Did you mean 'train'?"),
    "a shell command": (["--", "bash", "-c", "ls"], "The verbs: train,"),
    "a program alone": (["--", "orchestrate"], "say what to run"),
    "unknown option": (["--", "train", "--nmae", "x"], "orchestrate train --help"),
    "option of another verb": (["--", "show", "--name", "x"], "--name"),
    "unknown preset": (["--", "train", "codelm/tny"], "codelm/tiny"),
    "a run of the cluster": (["--", "train", "first-run"], "repeat the command that began it"),
    "a path of the configuration": (["--", "train", "codelm/tiny", "optim.lrr=1"], "optim.lr"),
    "a value of the configuration": (["--", "train", "codelm/tiny", "model.d_model=130"], "d_model"),
    "an option's value": (["--", "train", "--workers", "two"], "--workers"),
    "a value that an option means": (["--", "train", "--precision", "fp8"], "fp8"),
    "bad name": (["--", "train", "--name", "../x"], "../x"),
    "runs in the working directory": (["--", "train", "--runs-dir", "runs"], "full path"),
    "missing file": (["--", "train", "mine.yaml"], "mine.yaml"),
    "a file that stays here": (["--", "train", "ignored.yaml"], "ignored.yaml is not sent along"),
    "text that stays here": (["--", "train", "--data", "ignored.txt"], "ignored.txt is not sent along"),
    "text that a file names": (["--", "train", "bad.yaml"], "ignored.txt is not sent along"),
    "text beside the directory": (["--", "train", "--data", "../outside.txt"], "outside.txt is not sent along"),
    "a sweep's target": (["--", "tune", "codelm/tny"], "codelm/tiny"),
    "a sweep's space": (["--", "tune", "codelm/tiny", "--space", "lrr"], "lrr"),
    "an axis": (["--", "tune", "codelm/tiny", "--set-space", "optim.lrr=log(1e-5,1e-3)"], "optim.lrr"),
    "trials of a sweep": (["--", "tune", "codelm/tiny", "--trials=0"], "--trials must be at least 1"),
    "seeds of a sweep": (["--", "tune", "codelm/tiny", "--seeds", "0"], "--seeds"),
    "an objective": (["--", "tune", "codelm/tiny", "--objective", "val/f1"], "never reported"),
    "a population of three": (["--", "tune", "codelm/tiny", "--scheduler", "pbt", "--trials", "3"], "at least 4"),
    "losses of two texts": (
        ["--", "tune", "fundamentallm/two-phase", "--space", "phase_lengths", "--scheduler", "asha"],
        "say --scheduler none",
    ),
    "time of a sweep": (["--", "tune", "codelm/tiny", "--max-time", "soon"], "--max-time is a time"),
    "memory of a sweep": (["--", "tune", "codelm/tiny", "--memory-limit", "4"], "--memory-limit"),
    "nobody at a time": (["--", "tune", "codelm/tiny", "--concurrent", "0"], "--concurrent"),
    "int4 from nothing": (["--", "tune", "codelm/tiny", "--set-space", "precision=[bf16,int4]"], "--init-from"),
    "a range upside down": (["--", "find-lr", "codelm/tiny", "--from", "1", "--to", "0.1"], "Did you mean"),
    "rows of none": (["--", "find-batch", "codelm/tiny", "--max", "0"], "--max 0"),
    "memory of a batch": (["--", "find-batch", "codelm/tiny", "--memory-limit", "lots"], "--memory-limit"),
    "a precision of several": (["--", "bench", "codelm/tiny", "--precision", "fp32,fp8"], "fp8"),
    "a batch of none": (["--", "bench", "codelm/tiny", "--batch", "8,0"], "--batch"),
    "a space that stays here": (["--", "tune", "codelm/tiny", "--space", "ignored.space"], "ignored.space is not sent"),
    "an argument too few": (["--", "generate"], "RUN"),
    "itself": (["--", "submit", "--", "train"], "another"),
    "no command": ([], "--submission-id"),
    "stop without a name": (["--stop"], "--submission-id"),
    "stop with a command": (["--stop", "--", "train"], "takes no command"),
    "bad id": (["--submission-id", "../x", "--", "train"], "../x"),
    "secret name": (["--env", "HF_TOKEN=abc", "--", "train"], "HF_TOKEN"),
    "secret value": (["--env", "MLFLOW_TRACKING_URI=http://me:pass@host", "--", "train"], "secret"),
    "no value": (["--env", "NAME", "--", "train"], "NAME=VALUE"),
    "no name": (["--env", "1A=2", "--", "train"], "NAME=VALUE"),
    "cpus": (["--cpus", "-1", "--", "train"], "--cpus"),
    "no folder": (["--working-dir", "/nowhere", "--", "train"], "/nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anybody_is_asked(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = BAD[case]
    assert main(["submit", "--address", NOBODY, *arguments]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.count("error:") == 1
    assert "nothing answers" not in err and "pass@" not in err


GOOD = {
    "preset": ["train", "codelm/tiny", "--name", "a", "optim.lr=1e-3"],
    "with the program's name": ["orchestrate", "train", "codelm/tiny"],
    "file": ["train", "good.yaml"],
    "sweep": ["tune", "codelm/tiny", "--space", "lr", "--trials", "4"],
    "space": ["tune", "codelm/tiny", "--space", "my.yaml"],
    "text that is sent": ["train", "--data", "small.txt"],
    "text by its full path": ["train", "--data", "/shared/corpus"],
    "a run of the cluster to start from": ["train", "--init-from", "first-run"],
    "int4 from a run of the cluster": ["train", "codelm/tiny", "--init-from", "first-run", "--precision", "int4"],
    "a sweep from a run of the cluster": [
        "tune",
        "codelm/tiny",
        "--init-from",
        "first-run",
        "--set-space",
        "precision=[bf16,int4]",
    ],
    "a sweep with all it can have": [
        "tune",
        "codelm/tiny",
        "--space",
        "lr_batch",
        "--trials",
        "4",
        "--searcher",
        "random",
        "--scheduler",
        "median",
        "--seeds",
        "3",
        "--max-time",
        "1h30m",
        "--max-tokens",
        "1000000",
        "--memory-limit",
        "4GiB",
        "--grace",
        "1000",
        "--gpus-per-trial",
        "0.25",
        "--concurrent",
        "2",
        "--cpus-per-trial",
        "64",
        "--then-train",
        "--name",
        "s",
    ],
    "a population": ["tune", "codelm/tiny", "--scheduler", "pbt", "--searcher", "random", "--trials", "4"],
    "a range": ["find-lr", "codelm/tiny", "--from", "1e-5", "--to", "1"],
    "a micro-batch": ["find-batch", "codelm/tiny", "--max", "8", "--memory-limit", "2GiB"],
    "several precisions": ["bench", "codelm/tiny", "--batch", "4,8", "--precision", "fp32,bf16"],
    "no target": ["runs", "--json"],
    "a run of the cluster": ["status", "first-run"],
    "runs on a disk": ["train", "--runs-dir", "/shared/runs"],
}


@pytest.mark.parametrize("case", GOOD)
def test_good_input_is_not_refused(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The negative control of the table above: it comes as far as the cluster, which is not there."""
    assert main(["submit", "--address", NOBODY, "--", *GOOD[case]]) == BAD_INPUT
    assert f"nothing answers at {NOBODY}" in capsys.readouterr().err


def test_what_is_not_installed_here_may_be_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A laptop without bitsandbytes sends a sweep over int8, and refuses it to itself."""
    monkeypatch.setattr(precisions, "find_spec", lambda name: None)
    sweep = [
        "tune",
        "codelm/tiny",
        "--device",
        "cuda",
        "--set-space",
        "precision=[bf16,int8]",
        "--runs-dir",
        "/nowhere",
    ]
    assert main(["submit", "--address", NOBODY, "--", *sweep]) == BAD_INPUT
    assert f"nothing answers at {NOBODY}" in capsys.readouterr().err
    assert main(sweep) == BAD_INPUT
    assert "pip install bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["the page", "--help"])
def test_the_examples_are_commands_that_can_be_sent(place: str) -> None:
    page = (ROOT / "docs" / "cluster.md").read_text() if place == "the page" else inspect.getdoc(submit) or ""
    sent = [shlex.split(line.partition(" -- ")[2]) for line in page.splitlines() if SENT in line and " -- " in line]
    assert {"train", "tune"} <= {check(command).verb for command in sent}
    with pytest.raises(UserError):  # the control
        check([*sent[0], "--trails", "4"])


def test_text_by_its_full_path_may_lie_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cluster may see this disk too."""
    main(["submit", "--address", NOBODY, "--", "train", "--data", str(tmp_path / "outside.txt")])
    assert "nothing answers" in capsys.readouterr().err


def test_a_verb_with_more_to_check_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.verbs import checked

    monkeypatch.setitem(checked.CHECKS, "plan", lambda parameters, config: (config.preset, str(parameters["json"])))
    assert check(["plan", "codelm/tiny"]).files == ("codelm/tiny", "False")
    assert check(["show", "codelm/tiny"]).files == ()


def test_this_machines_runs_folder_is_not_the_clusters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORCHESTRATE_RUNS", str(tmp_path))
    assert check(["train", "codelm/tiny"]).takes_runs_dir
    assert not check(["train", "codelm/tiny", "--runs-dir", str(tmp_path)]).takes_runs_dir
    assert not check(["presets"]).takes_runs_dir


# ---- addresses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "",
        "http://a b:8265",
        "http://a:8265\n",
        "localhost:8265",
        "ray://host:10001",
        "auto",
        "http://",
        "http://h:x",
        "http://me:pw@h",
        "ftp://h",
    ],
)
def test_what_is_no_dashboards_url(address: str) -> None:
    with pytest.raises(SubmissionError, match="--address"):
        checked_address(address)
    assert checked_address("https://h:8265/") == "https://h:8265"


class Stranger(BaseHTTPRequestHandler):
    """Answers every question as its server was told to."""

    def do_GET(self) -> None:
        status, kind, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((200, "text/html", "<html>a router</html>"), "is no Ray dashboard"),
        ((200, "application/json", '{"version": "1"}'), "is no Ray dashboard"),
        ((404, "text/plain", "not here"), "404"),
        ((500, "text/plain", "broken"), "500"),
        ((401, "text/plain", "who are you"), "does not accept the token of"),
        ((403, "text/plain", "not you"), "does not accept the token of"),
    ],
)
def test_others_that_answer(
    stranger: HTTPServer, answer: tuple[int, str, str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger.answer = answer  # type: ignore[attr-defined]
    address = f"http://127.0.0.1:{stranger.server_address[1]}"
    assert main(["submit", "--address", address, "--", "train"]) == BAD_INPUT
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "Traceback" not in err
    assert expected in err and address in err
    assert "0" * 64 not in err


def test_one_that_never_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cluster.submit, "TIMEOUT_S", (1.0, 0.5))
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        assert main(["submit", "--address", address, "--", "train"]) == BAD_INPUT
    assert "does not answer" in capsys.readouterr().err


def test_a_token_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert main(["submit", "--address", NOBODY, "--", "train"]) == BAD_INPUT
    assert f"RAY_AUTH_TOKEN_PATH names {tmp_path / 'none'}" in capsys.readouterr().err


# ---- the job ---------------------------------------------------------------------------------------------


def shell(entrypoint: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an entrypoint as Ray does, with a `python` that prints its arguments."""
    python = folder / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 75\n')
    python.chmod(0o755)
    return subprocess.run(
        entrypoint,
        shell=True,
        env={"PATH": f"{folder}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def job(*argv: str, needs: str | None = None) -> Job:
    return Job(("orchestrator", *argv), Parcel(Path("."), {}, {}), {}, 1, "id", needs)


@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1)))
def test_the_shell_leaves_the_arguments_as_they_are(words: list[str]) -> None:
    assert shlex.split(job(*words).entrypoint) == ["exec", "python", "-m", "orchestrator", *words]


def test_the_commands_own_code_comes_through_the_shell(tmp_path: Path) -> None:
    ended = shell(job("train", "a b", "$(exit 1)", "it's").entrypoint, tmp_path)
    assert ended.returncode == 75
    assert ended.stdout.splitlines() == ["-m", "orchestrator", "train", "a b", "$(exit 1)", "it's"]


@pytest.mark.parametrize(("runs", "code"), [(None, 2), ("", 2), ("runs", 2), ("/shared", 75), ("/a b", 75)])
def test_a_cluster_that_does_not_say_where_runs_go(tmp_path: Path, runs: str | None, code: int) -> None:
    environment = {} if runs is None else {"ORCHESTRATE_RUNS": runs}
    ended = shell(job("train", needs="ORCHESTRATE_RUNS").entrypoint, tmp_path, **environment)
    assert ended.returncode == code
    assert ("ORCHESTRATE_RUNS must name a folder" in ended.stderr) is (code == 2)


# ---- following -------------------------------------------------------------------------------------------


@given(st.text(), st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(0, 12), max_size=6)), max_size=5))
def test_a_connection_made_anew_repeats_nothing(log: str, connections: list[tuple[int, list[int]]]) -> None:
    """However often the connection breaks, and in whatever pieces it delivers: each character once, in order."""
    shown: list[str] = []
    output = Output(shown.append)
    for _, sizes in connections:
        output.rewind()
        position = 0
        for size in sizes:
            output.add(log[position : position + size])
            position += size
        assert log.startswith("".join(shown))
    output.complete(log)
    assert "".join(shown) == log


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("SUCCEEDED", None, 0),
        ("FAILED", 2, 2),
        ("FAILED", 3, 3),
        ("FAILED", 75, 75),
        ("FAILED", -9, 137),
        ("FAILED", None, None),
        ("STOPPED", None, None),
    ],
)
def test_what_an_ending_means(status: str, code: int | None, expected: int | None) -> None:
    from ray.job_submission import JobStatus

    details = SimpleNamespace(status=JobStatus(status), driver_exit_code=code, message="why")
    assert ending(details) == Ending(status, expected, "why")


def test_an_ending_that_ray_does_not_know_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    from orchestrator.verbs.cluster import _conclude

    assert _conclude(Ending("FAILED", None, "the runtime environment\nfailed"), "id") == 1
    assert "Ray keeps no exit code of it: the runtime environment" in capsys.readouterr().err
    assert _conclude(Ending("FAILED", 75, ""), "id") == 75


def test_the_working_directory_of_this_project_is_small() -> None:
    from cluster.parcel import pack

    parcel = pack(Path(__file__).parents[2])
    assert parcel.size < 4 << 20
    assert {"orchestrator/__main__.py", "trainers/loop.py", "search_spaces/__init__.py"} <= set(parcel.files)
    assert not any(name.startswith(("tests/", "benchmarks/", ".git/", "runs/")) for name in parcel.files)
    assert json.dumps(parcel.left_out) == "{}"
