"""How a run's end is told: to MLflow, to the person, to the caller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.closing_table import closing_of, closing_table
from orchestrator.console import print_json
from orchestrator.experiment import Experiment, Request
from orchestrator.tracker import Tracker
from trainers.errors import TrainingFailed, UserError

if TYPE_CHECKING:
    from orchestrator.feeder import Delivered


@contextlib.contextmanager
def ended_truthfully(tracker: Tracker) -> Iterator[None]:
    """Whatever ends the driver inside, its MLflow run does not stay RUNNING."""
    try:
        yield
    except (UserError, TrainingFailed):
        raise  # the run was ended before these were raised
    except BaseException as error:
        tracker.close({"state": "failed", "reason": f"the driver ended: {type(error).__name__}: {error}"})
        raise


def failure(reason: str) -> Exception:
    """The exception, and so the exit code, that the last word of a run means."""
    kind, _, text = reason.partition(": ")
    if kind == "bad_input":
        return UserError(text)
    return TrainingFailed(text if kind in ("training_failed", "nonfinite") else reason)


def brief(error: BaseException | None) -> str:
    """The last line of an error that may carry another process's whole traceback."""
    lines = str(error).strip().splitlines() if error else []
    return lines[-1].strip() if lines else "no reason given"


def draw(run_dir: Path, name: str) -> None:
    """plots/ and the readable samples, from the record alone."""
    from orchestrator.plots import plot_curves
    from orchestrator.samples import render_samples

    plot_curves(run_dir / "metrics.jsonl", run_dir / "plots" / "curves.png", name)
    render_samples(run_dir / "samples")


def show_closing(experiment: Experiment, request: Request, seconds: float | None, notes: tuple[str, ...]) -> None:
    """The closing table, or the JSON document of it."""
    closing = closing_of(request.runs_dir, experiment.name, seconds=seconds, notes=notes)
    if not request.json:
        closing_table(closing)
    elif request.document is None:
        print_json(closing.to_json())
    else:
        print_json({**request.document, "training": closing.to_json()})


def pending(delivered: Delivered | None) -> tuple[str, ...]:
    """A note about rows that MLflow has not got yet."""
    if delivered is None or not delivered.pending:
        return ()
    return (f"{delivered.pending} rows wait for MLflow ({delivered.problem}); the same command sends them later.",)
