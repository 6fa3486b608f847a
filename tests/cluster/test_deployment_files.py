"""Laws of the Dockerfile, the RayJob and the Slurm script, as far as they can be had without Docker and a cluster."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from orchestrator.verbs.checked import check
from tests.cluster.rayjob_fields import PodSpec, RayJob

PROJECT = Path(__file__).parents[2]
CLUSTER = PROJECT / "cluster"
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"


# ---- Dockerfile ------------------------------------------------------------------------------------------


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, its arguments) of a Dockerfile, comments gone and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def faults(text: str) -> list[str]:
    """What a Dockerfile of ours may not do."""
    found, parsed = [], instructions(text)
    bases = [rest.split()[0] for word, rest in parsed if word == "FROM"]
    pinned = re.compile(r".+(:\d+\.\d+\.\d+[\w.-]*|@sha256:[0-9a-f]{64})")
    found += [f"base {base} is not pinned" for base in bases if not pinned.fullmatch(base)]
    users = [rest for word, rest in parsed if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        found.append("ends as root, or as a user that Kubernetes cannot tell from root")
    copied: set[str] = set()
    for word, rest in parsed:
        copied |= set(rest.split()[:-1]) if word in ("COPY", "ADD") else set()
        if word == "ADD":
            found.append("ADD fetches and unpacks: COPY")
        if word == "RUN" and "pip install" in rest:
            if "--constraint constraints.txt" not in rest or "constraints.txt" not in copied:
                found.append("pip without the constraints")
            if "--no-cache-dir" not in rest:
                found.append("pip keeps its cache in the layer")
        if word == "RUN" and "apt-get install" in rest and "rm -rf /var/lib/apt/lists" not in rest:
            found.append("apt keeps its lists in the layer")
    stays = " ".join(rest for word, rest in parsed if word in ("ENV", "ARG"))
    if re.search(r"(?i)(token|password|secret)\w*=\S", stays):
        found.append("a secret in a layer")
    return found


DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def test_the_image() -> None:
    assert faults(DOCKERFILE) == []
    environment = dict(
        pair.split("=", 1) for word, rest in instructions(DOCKERFILE) if word == "ENV" for pair in rest.split()
    )
    assert environment["RAY_AUTH_MODE"] == "token"
    assert int(environment[STOP_WAIT]) >= 60
    assert environment["ORCHESTRATE_RUNS"].startswith("/")
    sources = {source for word, rest in instructions(DOCKERFILE) if word == "COPY" for source in rest.split()[:-1]}
    assert all((PROJECT / source).exists() for source in sources)
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*" and {f"!{source}" for source in sources} <= set(ignored), "not in the build's context"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"USER 1000:1000", "USER root"),
        (r"USER 1000:1000", "USER ray"),
        (r"USER 1000:1000", ""),
        (r"FROM \S+", "FROM python:3.11-slim"),
        (r"FROM \S+", "FROM python:latest"),
        (r"COPY constraints.txt \./", ""),
        (r"--constraint constraints.txt \"", '"'),
        (r"--no-cache-dir ", ""),
        (r"&& rm -rf /var/lib/apt/lists/\* ", ""),
        (r"RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=abc"),
        (r"COPY pyproject.toml", "ADD pyproject.toml"),
    ],
)
def test_the_laws_of_the_image_refuse_what_breaks_them(old: str, new: str) -> None:
    flat = re.sub(r" \\\n +", " ", DOCKERFILE)
    broken = re.sub(old, new, flat)
    assert broken != flat
    assert faults(broken) != []


# ---- RayJob ----------------------------------------------------------------------------------------------


def rayjob() -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / "rayjob.yaml").read_text()))


def test_the_rayjob_has_the_published_fields() -> None:
    RayJob.model_validate(rayjob())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.entryPoint", "x"),
        ("spec.ttlSecondsAfterFinished", "300"),
        ("spec.submissionMode", "HttpMode"),
        ("spec.shutdownAfterJobFinishes", False),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams", {"num-cpus": 0}),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.volumes", []),
        ("spec.rayClusterSpec.workerGroupSpecs", [{}]),
        ("apiVersion", "ray.io/v1alpha1"),
        ("metadata.name", "x" * 60),
    ],
)
def test_the_fields_refuse_what_kuberay_would(path: str, value: object) -> None:
    job = rayjob()
    *outer, last = path.split(".")
    part = job
    for key in outer:
        part = part[key]
    part[last] = value
    with pytest.raises(ValidationError):
        RayJob.model_validate(job)


def pods(job: RayJob) -> list[PodSpec]:
    cluster = job.spec.ray_cluster_spec
    assert cluster is not None
    return [cluster.head_group_spec.template.spec, *(group.template.spec for group in cluster.worker_group_specs)]


def test_a_rayjob_that_is_taken_away_saves_first() -> None:
    """The stop outlives Ray's 3 s, and the pods outlive the stop, which their hooks ask for or wait for."""
    job = RayJob.model_validate(rayjob())
    stop_s = int(yaml.safe_load(job.spec.runtime_env_yaml)["env_vars"][STOP_WAIT])
    assert stop_s >= 60
    for pod in pods(job):
        assert pod.termination_grace_period_seconds > stop_s
        hook = pod.containers[0].lifecycle
        assert hook is not None and hook.pre_stop is not None
        shell, option, script = hook.pre_stop.exec.command
        assert (shell, option) == ("/bin/sh", "-c")
        assert f" {job.spec.job_id} " in script
        subprocess.run(["/bin/sh", "-n", "-c", script], check=True)


def test_the_rayjob_runs_a_command_that_this_version_understands() -> None:
    """With authentication, not as root, its runs on the volume that every node mounts."""
    job = RayJob.model_validate(rayjob())
    cluster = job.spec.ray_cluster_spec
    assert cluster is not None and cluster.auth_options is not None
    assert cluster.auth_options.mode == "token"
    assert job.spec.shutdown_after_job_finishes and job.spec.ttl_seconds_after_finished > 0
    python, option, module, *argv = shlex.split(job.spec.entrypoint)
    assert (python, option, module) == ("python", "-m", "orchestrator")
    target = check(argv).target
    assert target is not None
    workers = sum(group.replicas for group in cluster.worker_group_specs)
    assert target.config.workers <= workers and cluster.head_group_spec.ray_start_params["num-cpus"] == "0"
    shared = {tuple(mount.mount_path for mount in pod.containers[0].volume_mounts) for pod in pods(job)}
    [[folder]] = shared
    head = {variable.name: variable.value for variable in pods(job)[0].containers[0].env}
    assert str(head["ORCHESTRATE_RUNS"]).startswith(f"{folder}/")
    assert "MLFLOW_TRACKING_URI" in head, "SQLite cannot be shared between nodes"
    pinned = dict(line.split("==") for line in (PROJECT / "constraints.txt").read_text().split() if "==" in line)
    assert cluster.ray_version == pinned["ray"]


# ---- Slurm -----------------------------------------------------------------------------------------------

SLURM = CLUSTER / "slurm.sh"


def test_the_scripts_are_sound() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("bash -n finds nothing; shellcheck is not installed")
    found = subprocess.run([shellcheck, str(SLURM)], capture_output=True, text=True, check=False)
    assert found.stdout == ""


def test_slurm_signals_the_script_well_ahead_of_the_limit() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SLURM.read_text(), re.MULTILINE))
    target, name, ahead_s = re.fullmatch(r"(B):(USR1)@(\d+)", options["signal"]).groups()  # type: ignore[union-attr]
    assert (target, name) == ("B", "USR1") and int(ahead_s) >= 120
    assert "requeue" in options


STUBS = {
    # srun: `ray start --block`, until it is told to end
    "srun": 'echo "srun $*" >>"$LOG"; trap "echo ended >>\\"$LOG\\"; exit 0" TERM; while :; do sleep 0.05; done',
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "scontrol $*" >>"$LOG"; fi',
    "getent": 'echo "10.0.0.1 STREAM $2"',
    # python: the wait for the nodes (from standard input), or the command
    "python": """
if [ "$1" = - ]; then cat >/dev/null; echo "waited for $2 at $RAY_ADDRESS" >>"$LOG"; exit "${WAIT_CODE:-0}"; fi
echo "command $* at $RAY_ADDRESS, token of $(stat -c "%a, %s bytes" "$RAY_AUTH_TOKEN_PATH")" >>"$LOG"
trap "sleep 0.3; exit 75" USR1 TERM
[ -z "$FOREVER" ] || while :; do sleep 0.05; done
exit "${CODE:-0}"
""",
}


class Allocation:
    """A pretended Slurm allocation of two nodes in which the script runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "log"
        for name, body in STUBS.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        slurm = {"SLURM_JOB_ID": "712345", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        own = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "LOG": str(self.log),
            "FOREVER": "",
        }
        return subprocess.Popen(
            ["bash", str(SLURM), *arguments],
            env=own | slurm | {"SLURM_CPUS_PER_TASK": "8"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + 30
        while words not in self.said():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)


COMMAND = ("train", "codelm/tiny", "--name", "a b")


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_the_commands_code_is_the_jobs(allocation: Allocation, code: int) -> None:
    """75 too, which a person's stop gives: only a signal of Slurm queues the job again."""
    script = allocation.start(*COMMAND, CODE=str(code))
    assert script.wait(30) == code, script.stdout
    said = allocation.said()
    assert "--nodelist=node1 ray start --head --node-ip-address=10.0.0.1 --port=22345" in said
    assert "--nodelist=node2 ray start --address=10.0.0.1:22345" in said
    assert "waited for 2 at 10.0.0.1:22345" in said
    assert "command -m orchestrator train codelm/tiny --name a b at 10.0.0.1:22345, token of 600, 64 bytes" in said
    assert said.count("ended") == 2 and "requeue" not in said
    assert list((allocation.folder / ".orchestrate").iterdir()) == [], "the token is gone"


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_run_that_is_stopped_ahead_of_the_limit_is_queued_again(
    allocation: Allocation, number: int, requeued: bool
) -> None:
    script = allocation.start(*COMMAND, FOREVER="1")
    allocation.wait_for("command")
    time.sleep(0.2)  # for the trap of the stub
    script.send_signal(number)
    assert script.wait(30) == 75
    assert ("scontrol requeue 712345" in allocation.said()) is requeued
    assert allocation.said().count("ended") == 2


def test_a_cluster_that_does_not_come_up(allocation: Allocation) -> None:
    script = allocation.start(*COMMAND, WAIT_CODE="1")
    assert script.wait(30) == 1
    assert "command" not in allocation.said() and allocation.said().count("ended") == 2


def test_no_command_is_no_job(allocation: Allocation) -> None:
    assert allocation.start().wait(30) == 2
    assert allocation.said() == ""
