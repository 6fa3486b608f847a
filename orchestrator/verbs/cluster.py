"""submit: a command checked here, run on a cluster. The only edge to the package `cluster`, and a lazy one."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.verbs.checked import check, refuse_what_stays
from trainers.errors import UserError

if TYPE_CHECKING:
    from cluster.follow import Ending
    from cluster.submit import Cluster

RUNS_VARIABLE = "ORCHESTRATE_RUNS"
STOP_WAIT_S = 300  # Ray gives a job 3 s to stop, which no checkpoint survives
UNKNOWN_ENDING = 1
DETACHED = 130
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def submit(
    address: Annotated[
        str,
        typer.Option(
            "--address",
            envvar="RAY_API_SERVER_ADDRESS",
            metavar="URL",
            help="The cluster's dashboard.",
            show_default=False,
        ),
    ],
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- VERB ARGUMENTS", help="What to run there.", show_default=False),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option("--working-dir", metavar="FOLDER", help="Sent along: the code and what the command names.")
    ] = Path("."),
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME=VALUE",
            help="Environment of the job, shown on the dashboard: no secrets. May be repeated.",
            show_default=False,
        ),
    ] = None,
    cpus: Annotated[
        float, typer.Option("--cpus", metavar="N", help="Reserved for the command itself; 0 runs it on the head.")
    ] = 1,
    submission_id: Annotated[
        str | None,
        typer.Option("--submission-id", metavar="ID", help="Name of the job.", show_default="verb + 12 digits"),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id and leave.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the job --submission-id, and see it end.")] = False,
) -> int:
    """Run a command on a Ray cluster: checked here, sent there, its output and exit code ours.

    [bold]Examples[/bold]

      orchestrate submit --address http://HOST:8265 -- train codelm/tiny --name a --runs-dir /shared/runs
      orchestrate submit --address http://HOST:8265 -- tune codelm/tiny --space lr --name b --runs-dir /shared/runs
      orchestrate submit --address http://HOST:8265 --submission-id ID          (follow that job again)
      orchestrate submit --address http://HOST:8265 --submission-id ID --stop

    Runs go to --runs-dir, by its full path, or to the cluster's ORCHESTRATE_RUNS. The cluster's token is read from the
    file RAY_AUTH_TOKEN_PATH names, else from ~/.ray/auth_token, else from ~/.orchestrate/ray_token.

    Ctrl-C leaves the job running and says how to follow and to stop it.
    Exit codes: the job's own; 1 where Ray does not know it; 2 bad input; 130 left by Ctrl-C.
    """
    from cluster.errors import SubmissionError

    try:
        if not command:
            cluster, job = _existing(address, submission_id, stop)
        else:
            if stop:
                raise UserError("--stop stops the job --submission-id and takes no command.")
            cluster, job = _send(address, command, working_dir.absolute(), _environment(env, cpus), cpus, submission_id)
        if no_wait:
            print(job)
            return 0
        return _follow(cluster, job)
    except SubmissionError as error:
        raise UserError(str(error)) from None


# ---- sending it ------------------------------------------------------------------------------------------


def _environment(pairs: list[str] | None, cpus: float) -> dict[str, str]:
    """The job's environment: what --env says and what we know better. Raises UserError for anything secret."""
    from orchestrator.redaction import is_secret_name, redact

    if not 0 <= cpus < float("inf"):
        raise UserError(f"--cpus is a number of CPUs, 0 or more; got {cpus}.")
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "ORCHESTRATE_DRIVER_CPUS": f"{cpus:g}"}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not VARIABLE.fullmatch(name):
            raise UserError(f"--env takes NAME=VALUE, got {redact(pair)[:60]!r}.")
        if is_secret_name(name) or redact(value) != value:
            raise UserError(
                f"--env {name}: a job's environment is shown on the cluster's dashboard, so a secret does not belong "
                "there. Give it to the cluster's nodes themselves, or name a file on their disk."
            )
        environment[name] = value
    return environment


def _send(
    address: str, command: list[str], root: Path, env: dict[str, str], cpus: float, submission_id: str | None
) -> tuple[Cluster, str]:
    from cluster.parcel import mib, pack
    from cluster.submit import Cluster, Job, check_submission_id, checked_address, new_submission_id

    if not root.is_dir():
        raise UserError(f"--working-dir {root} is no folder.")
    checked_address(address)
    with contextlib.chdir(root):
        checked = check(command)
    job_id = submission_id or new_submission_id(checked.verb)
    check_submission_id(job_id)
    parcel = pack(root)
    refuse_what_stays(checked, root, parcel.holds)
    needs = RUNS_VARIABLE if checked.takes_runs_dir and not env.get(RUNS_VARIABLE, "").startswith("/") else None
    cluster = Cluster(address, _token())
    for folder, size in parcel.left_out.items():
        _say(f"not sent: {folder}/ ({mib(size)}) holds no Python and is taken for data")
    _say(f"sending {len(parcel.files)} files ({mib(parcel.size)}) to {cluster.address} as job {job_id}")
    cluster.send(Job(("orchestrator", *checked.argv), parcel, env, cpus, job_id, needs))
    return cluster, job_id


def _existing(address: str, submission_id: str | None, stop: bool) -> tuple[Cluster, str]:
    from cluster.submit import Cluster, check_submission_id

    if submission_id is None:
        raise UserError(
            "say what to run, after --, such as `-- train codelm/tiny --name a`; or follow a job with --submission-id."
        )
    check_submission_id(submission_id)
    cluster = Cluster(address, _token())
    if stop:
        asked = cluster.stop(submission_id)
        _say(f"asked {submission_id} to stop" if asked else f"{submission_id} was not running")
    return cluster, submission_id


def _token() -> str:
    """Turn token authentication on; where the token comes from, in words."""
    from orchestrator.ray_cluster import ask_for_token

    return ask_for_token(joining=True)


# ---- seeing it end ---------------------------------------------------------------------------------------


def _follow(cluster: Cluster, job_id: str) -> int:
    from cluster.follow import follow

    try:
        return _conclude(follow(cluster, job_id, _show, _say), job_id)
    except KeyboardInterrupt:
        again = f"orchestrate submit --address {cluster.address} --submission-id {job_id}"
        _say(f"left job {job_id} running. Follow it again, or stop it at its next step, with a checkpoint:")
        _say(f"  {again}\n  {again} --stop")
        return DETACHED


def _conclude(ending: Ending, job_id: str) -> int:
    if ending.exit_code is not None:
        _say(f"job {job_id} ended with exit code {ending.exit_code}")
        return ending.exit_code
    reason = next((line for line in ending.message.splitlines() if line.strip()), "Ray gives no reason")
    _say(f"job {job_id} is {ending.status}, and Ray keeps no exit code of it: {reason}")
    return UNKNOWN_ENDING


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    """What we have to say goes to standard error: standard output is the job's."""
    print(text, file=sys.stderr, flush=True)
