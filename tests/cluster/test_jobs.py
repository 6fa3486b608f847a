"""Laws of a job: it ends as the same command does here, with its exit code, and what is wrong here is never sent."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.ray_cluster import usable_cpus
from tests.cluster.head import BIN, Head
from tests.orchestrator.faults import CONFIG, WORDS, checkpoint_steps, newest_step
from tests.orchestrator.sweep_episodes import assert_same_sweep, assert_sweep_told, left_by
from tests.trainers.crash import assert_same, ending, finished

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PROJECT = Path(__file__).parents[2]
PACKAGES = ("trainers", "search_spaces", "orchestrator", "cluster")
PATIENCE_S = 240.0
NO_PATIENCE = "RAY_JOB_STOP_WAIT_TIME_S=0"
MARK = "\nprint('the code is that of', __file__, flush=True)\n"


class Desk:
    """A person's working directory, a cluster, and the disk that the cluster sees."""

    def __init__(self, folder: Path, head: Head):
        self.head = head
        self.root = folder / "project"
        self.shared = folder / "shared"
        self.shared.mkdir()
        for package in PACKAGES:
            shutil.copytree(PROJECT / package, self.root / package, ignore=shutil.ignore_patterns("__pycache__"))
        with (self.root / "orchestrator" / "verbs" / "__init__.py").open("a") as module:
            module.write(MARK)
        rng = random.Random(0)
        (self.root / "small.txt").write_text(" ".join(rng.choice(WORDS) for _ in range(8000)))
        (self.root / "small.yaml").write_text(CONFIG.format(text="small.txt", steps=24, save_every=8))

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.root,
            env=self.head.environment(**environment),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def submit(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        typed = ["submit", "--address", self.head.address, *arguments]
        return self.run(sys.executable, "-m", "orchestrator", *typed, **environment)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A submission to be watched."""
        typed = ["submit", "--address", self.head.address, *arguments]
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *typed],
            cwd=self.root,
            env=self.head.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hears_ctrl_c,
        )

    def jobs(self) -> list[dict[str, Any]]:
        """Every job the cluster has heard of, as plain `ray job` sees them."""
        listed = "import json, sys; from ray.job_submission import JobSubmissionClient as C; "
        listed += "print('JOBS', json.dumps([job.dict() for job in C(sys.argv[1]).list_jobs()], default=str))"
        out = self.run(sys.executable, "-W", "ignore", "-c", listed, self.head.address).stdout
        return list(json.loads(out.split("JOBS ", 1)[1]))


def hears_ctrl_c() -> None:
    """As at a terminal: whatever a shell starts in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while newest_step(run_dir) < step:
        assert time.monotonic() < deadline, f"no step {step} in {PATIENCE_S} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """One cluster for the module: as many CPUs as this machine, and one more for the command itself."""
    folder = tmp_path_factory.mktemp("desk")
    head = Head(folder, usable_cpus() + 1)
    try:
        head.wait_until_up()
        yield Desk(folder, head)
    finally:
        head.close()


def test_a_job_ends_as_the_same_command_does_here(desk: Desk) -> None:
    """The same bits, by the code and the text that were sent along; and again, by plain `ray job submit`."""
    command = ("train", "small.yaml", "--name", "small")
    elsewhere = str(desk.shared / "runs")
    job = desk.submit(
        *("--submission-id", "first", "--env", f"ORCHESTRATE_RUNS={elsewhere}", "--", *command),
        RAY_ADDRESS="http://127.0.0.1:1",  # Ray would go there instead
    )
    assert job.returncode == 0, job.stdout + job.stderr
    here = desk.run(sys.executable, "-m", "orchestrator", *command, "--runs-dir", "here")
    assert here.returncode == 0, here.stdout + here.stderr

    there, at_home = ending(desk.shared / "runs" / "small", 0), ending(desk.root / "here" / "small", 0)
    assert_same(finished(there), finished(at_home))
    assert there.step == 24
    code = f"{desk.head.temporary}/session"
    assert f"the code is that of {code}" in job.stdout
    assert f"the code is that of {desk.root}" in here.stdout
    assert "Running entrypoint" in job.stdout and "ended with exit code 0" in job.stderr

    [details] = desk.jobs()
    assert (details["submission_id"], details["driver_exit_code"]) == ("first", 0)
    assert desk.head.token.read_text() not in json.dumps(details) + job.stdout + job.stderr

    again = desk.submit("--submission-id", "first")
    assert again.returncode == 0
    assert again.stdout.endswith(job.stdout.splitlines(keepends=True)[-1])
    assert desk.submit("--submission-id", "first", "--no-wait").stdout.splitlines()[-1] == "first"

    plain = desk.run(
        *(str(BIN / "ray"), "job", "submit", "--address", desk.head.address, "--working-dir", "."),
        *("--", "python", "-m", "orchestrator", *command, "--runs-dir", elsewhere),
    )
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert "small is finished; nothing to do." in plain.stdout


@pytest.mark.slow
def test_a_sweep_sent_as_a_job_ends_as_it_does_here(desk: Desk) -> None:
    """Every trial's settings, configuration, rows and final loss, and the best checkpoint; MLflow has all of it."""
    text, runs = str(shutil.copy(desk.root / "small.txt", desk.shared)), desk.shared / "sweeps"
    command = ("tune", "small.yaml", "--data", text, "--name", "sweep", "--set-space", "optim.lr=log(1e-3,3e-2)")
    command += ("--set-space", "batch.sequences=[4,8]", "--trials", "3", "--searcher", "random", "--scheduler", "none")
    before = len(desk.jobs())
    for typo, word in (
        ("optim.lrr=1e-3", "optim.lr"),
        ("--set-space=optim.lrr=[1]", "lrr"),
    ):
        refused = desk.submit("--", *command, "--runs-dir", str(runs), typo)
        assert (refused.returncode, refused.stdout.count("Running entrypoint")) == (2, 0), refused.stdout
        assert word in refused.stderr
    assert len(desk.jobs()) == before and not runs.exists()

    job = desk.submit("--", *command, "--runs-dir", str(runs))
    assert job.returncode == 0, job.stdout + job.stderr
    here = desk.run(sys.executable, "-m", "orchestrator", *command, "--runs-dir", "here")
    assert here.returncode == 0, here.stdout + here.stderr
    assert_same_sweep(runs / "sweep", left_by(desk.root / "here" / "sweep"))
    assert len(assert_sweep_told(runs, "sweep")) == 3


@pytest.mark.slow
def test_what_fails_there_fails_here(desk: Desk) -> None:
    command = ("--submission-id", "bad", "--", "train", "small.yaml", "--data", "/nowhere/text.txt")
    bad_data = desk.submit(*command, "--runs-dir", str(desk.shared))
    assert bad_data.returncode == 2, bad_data.stdout + bad_data.stderr
    assert "/nowhere/text.txt" in bad_data.stdout
    twice = desk.submit(*command, "--runs-dir", str(desk.shared))
    assert twice.returncode == 2
    assert "refuses" in twice.stderr and "bad" in twice.stderr and twice.stdout.count("Running entrypoint") == 0
    nowhere_to_write = desk.submit("--", "train", "small.yaml")
    assert nowhere_to_write.returncode == 2
    assert "ORCHESTRATE_RUNS must name a folder" in nowhere_to_write.stdout


def test_what_is_wrong_here_is_never_sent(desk: Desk) -> None:
    before = len(desk.jobs())
    typo = desk.submit("--", "train", "small.yaml", "optim.lrr=1e-3")
    assert (typo.returncode, typo.stdout.count("Running entrypoint")) == (2, 0)
    assert "optim.lr" in typo.stderr
    stranger = desk.root / "stranger"
    stranger.write_text("0" * 64)
    refused = desk.submit("--", "train", "small.yaml", RAY_AUTH_TOKEN_PATH=str(stranger))
    assert refused.returncode == 2
    assert f"does not accept the token of {stranger}" in refused.stderr
    assert len(desk.jobs()) == before
    unknown = desk.submit("--submission-id", "nobody")
    assert unknown.returncode == 2 and "nobody" in unknown.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "patience", "saved"), [("asked", (), True), ("cut-off", ("--env", NO_PATIENCE), False)]
)
def test_a_job_that_is_left_goes_on_and_one_that_is_stopped_saves_first(
    desk: Desk, name: str, patience: tuple[str, ...], saved: bool
) -> None:
    """Because Ray's patience with it is ours: with none at all it is cut off."""
    run_dir = desk.shared / name
    following = desk.start(
        *("--submission-id", name, *patience, "--", "train", "small.yaml", "--name", name),
        *("--runs-dir", str(desk.shared), "budget.steps=100000", "checkpoint.every_steps=90000"),
        "evaluation.every_steps=90000",
    )
    wait_for_step(run_dir, 5)
    following.send_signal(signal.SIGINT)
    out, err = following.communicate(timeout=PATIENCE_S)
    assert following.returncode == 130, out + err
    assert "Running entrypoint" in out and f"--submission-id {name} --stop" in err
    wait_for_step(run_dir, newest_step(run_dir) + 2)
    stopped = desk.submit("--submission-id", name, "--stop")
    assert stopped.returncode == 1, "Ray keeps no exit code of a job that was stopped"
    assert "is STOPPED" in stopped.stderr
    assert (run_dir / "outcome.json").exists() is saved
    assert checkpoint_steps(run_dir) == ([newest_step(run_dir)] if saved else [])
