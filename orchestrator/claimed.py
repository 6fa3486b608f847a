"""The claim on a run's folder for the life of a command, and a folder made for nothing taken away again."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from orchestrator.experiment import Experiment
from trainers.claim import Claim
from trainers.errors import UserError


@contextlib.contextmanager
def claimed(experiment: Experiment) -> Iterator[Claim]:
    """The claim on the run's folder, made if need be; a folder that we made goes away again when bad input or Ctrl-C
    comes before anything worth keeping is in it."""
    run_dir = experiment.run_dir
    made = make_folder(run_dir)
    try:
        claim = Claim.acquire(run_dir, say=say)
    except UserError:
        if made:
            with contextlib.suppress(OSError):
                run_dir.rmdir()  # succeeds only while nobody else has begun here
        raise
    with claim:
        try:
            refuse_another(experiment)
            yield claim
        except (UserError, KeyboardInterrupt):
            if made and not any((run_dir / "checkpoints").glob("step-*")):
                shutil.rmtree(run_dir, ignore_errors=True)
            raise


def make_folder(run_dir: Path) -> bool:
    """Whether the folder is ours: made just now, by this process."""
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError as error:
        if run_dir.is_dir():
            return False
        raise UserError(f"{run_dir} is a file: move it away, or choose another --name.") from error
    except OSError as error:
        raise UserError(
            f"cannot make {run_dir}: {error.strerror}. Choose a --runs-dir that you may write to."
        ) from error
    return True


def refuse_another(experiment: Experiment) -> None:
    """Whoever claimed the name between our look and our claim may have made it another run."""
    standing = experiment.identity.get("fingerprint", experiment.fingerprint)
    if standing not in (experiment.fingerprint, experiment.stood_as) and not experiment.extended:
        raise UserError(
            f"run {experiment.name!r} was begun meanwhile with another configuration. Choose another --name."
        )


def say(text: str) -> None:
    """A sentence for the person, beside whatever goes to standard output."""
    print(text, file=sys.stderr, flush=True)
