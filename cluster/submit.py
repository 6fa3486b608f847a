"""Cluster: a Ray cluster as its dashboard shows it, to which a command line is sent as a job.

Knows argv, a parcel of files and an environment, and nothing of what the command does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import SubmissionError
from cluster.parcel import Parcel

SUBMISSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
TIMEOUT_S = (10.0, 60.0)  # to connect, and between two bytes of an answer; Ray itself would wait for ever
OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # either would replace the address that was asked for
PYTHON = ("python", "-m")


@dataclass(frozen=True)
class Job:
    """A module's command line with all that it takes along."""

    argv: tuple[str, ...]
    """what follows `python -m`"""
    parcel: Parcel
    env: Mapping[str, str]
    """shown by the dashboard to whoever may see it: no secrets"""
    cpus: float
    """reserved for the command itself, besides what it starts; 0 runs it on the head"""
    submission_id: str
    needs_folder: str | None = None
    """a variable of the cluster that must name a folder by its full path, or the job ends at once with code 2"""

    @property
    def entrypoint(self) -> str:
        """The shell command: `exec`, so that a signal for the job reaches the command itself."""
        command = f"exec {shlex.join([*PYTHON, *self.argv])}"
        return command if self.needs_folder is None else f"{_guard(self.needs_folder)} {command}"


def _guard(variable: str) -> str:
    lost = (
        f"error: the cluster does not say where its disk is: {variable} must name a folder by its full path. What a "
        "job writes into its working directory is lost."
    )
    return f'case "${{{variable}-}}" in /*) ;; *) echo {shlex.quote(lost)} >&2; exit 2;; esac;'


def new_submission_id(verb: str) -> str:
    return f"{verb}-{uuid.uuid4().hex[:12]}"


class Cluster:
    """The job interface of one cluster. Raises SubmissionError for all that a person must mend.

    The token comes from where Ray looks for it (RAY_AUTH_TOKEN_PATH, say): it is sent as a header, and stands neither
    in an argument nor in a job's environment.
    """

    def __init__(self, address: str, token_source: str = "the environment"):
        self.address = checked_address(address)
        self.token_source = token_source
        with self._told_plainly(), _without(OVERRIDES):
            self.client = _connect(self.address)

    def send(self, job: Job) -> None:
        """Upload the parcel, unless the cluster has it, and start the job."""
        check_submission_id(job.submission_id)
        with self._told_plainly(), tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "parcel.zip"
            job.parcel.write(package)
            self.client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=job.submission_id,
                runtime_env={"working_dir": str(package), "env_vars": dict(job.env)},
                entrypoint_num_cpus=job.cpus or None,
            )

    def stop(self, submission_id: str) -> bool:
        """Ask a job to stop; False where it was not running. Returns before it has stopped."""
        with self._told_plainly():
            return bool(self.client.stop_job(submission_id))

    def info(self, submission_id: str) -> Any:
        """Ray's JobDetails."""
        with self._told_plainly():
            return self.client.get_job_info(submission_id)

    def log(self, submission_id: str) -> str:
        """All that the job has printed so far."""
        with self._told_plainly():
            return str(self.client.get_job_logs(submission_id))

    @contextlib.contextmanager
    def _told_plainly(self) -> Iterator[None]:
        """What Ray and its HTTP library raise, as one message."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise SubmissionError(
                f"{self.address} does not accept the token of {self.token_source}. Put the cluster's token into a file "
                "that only you can read, and name that file in RAY_AUTH_TOKEN_PATH."
            ) from None
        except requests.exceptions.Timeout:
            raise SubmissionError(f"{self.address} does not answer within {TIMEOUT_S[1]:.0f} s.") from None
        except (ConnectionError, requests.exceptions.ConnectionError):
            raise SubmissionError(
                f"nothing answers at {self.address}. Is the cluster up, its dashboard listening there, and the way "
                "open (a tunnel: ssh -L 8265:localhost:8265 HEAD, or kubectl port-forward)?"
            ) from None
        except requests.exceptions.RequestException as error:  # also a body that is no JSON
            raise SubmissionError(f"{self.address} is no Ray dashboard: {_brief(error)}.") from None
        except (KeyError, TypeError) as error:
            raise SubmissionError(f"{self.address} is no Ray dashboard: its version has no {error}.") from None
        except RuntimeError as error:
            raise SubmissionError(f"{self.address} refuses: {_brief(error)}") from None


def _connect(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    class PatientClient(JobSubmissionClient):
        """Ray's client, but it gives up in the end."""

        def _do_request(self, *args: Any, **options: Any) -> Any:
            return super()._do_request(*args, **{"timeout": TIMEOUT_S, **options})

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)  # "Uploading package ...": said better by us
    return PatientClient(address)


def checked_address(address: str) -> str:
    """The dashboard's URL without a slash at its end. Raises SubmissionError for anything else."""
    try:
        parts = urlsplit(address)
        blank = any(letter.isspace() for letter in address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not blank
    except ValueError:  # a port that is no number
        good = False
    if not good:
        raise SubmissionError(
            f"--address is the URL of the cluster's dashboard, such as http://HOST:8265; got {address!r}."
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise SubmissionError("--address takes no user, password or query: the token comes from RAY_AUTH_TOKEN_PATH.")
    return address.rstrip("/")


def check_submission_id(submission_id: str) -> None:
    """Raises SubmissionError for what could not name a log file."""
    if not SUBMISSION_ID.fullmatch(submission_id):
        raise SubmissionError(
            "a submission id is 1 to 128 letters, digits, '.', '_' or '-' and starts with a letter or digit; got "
            f"{submission_id[:60]!r}."
        )


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """The environment without some variables, for a while."""
    held = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def _brief(error: Exception) -> str:
    """The last line that says something: Ray answers with the server's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
