"""The driver of `orchestrate train`: claim the run, start Ray, watch the workers, tell MLflow, end truthfully.

The workers write the record (metrics.jsonl), the checkpoints and the outcome; the driver only reads them, so it may
be killed and started again at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.closing_table import closing_of, closing_table
from orchestrator.console import count, print_json, size
from orchestrator.display import Display
from orchestrator.experiment import OUTCOME, Experiment, Request, settle, write_atomically, write_identity
from orchestrator.plan import BYTES_PER_VALUE, total_steps
from orchestrator.presets_table import closed_form_parameters
from orchestrator.ray_cluster import Resources, ray_cluster, resources_per_worker
from orchestrator.ray_trainer import WORKER_RESTARTS, build_trainer
from orchestrator.tracker import Tracker, owes
from trainers.claim import Claim
from trainers.config import RunConfig
from trainers.context import NOTES, STOP_REQUEST, read_notes, request_stop
from trainers.data.prepare import data_hashes, prepare
from trainers.errors import TrainingFailed, UserError
from trainers.record import read_rows

if TYPE_CHECKING:
    from orchestrator.feeder import Delivered

POLL_S = 0.2  # how often the driver looks at the record
LAST_WORDS_S = 30.0  # for the workers to end by themselves once one of them has said how the run ended
DONE, STOPPED = 0, 75
METRICS = "metrics.jsonl"

T = TypeVar("T")


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def train(config: RunConfig, request: Request) -> int:
    """Train the run that `config` and `request` mean, from wherever it stands. Exit code: 0 done, 75 resumable.

    Raises UserError (exit code 2) before anything is made, TrainingFailed (exit code 3) when training cannot go on.
    """
    check_device(config)
    experiment = settle(config, request, data_hashes(config, cache_dir(request.runs_dir)))
    outcome = experiment.outcome
    if outcome and outcome["state"] == "finished" and not experiment.extended:
        return already_finished(experiment, request)
    with claimed(experiment) as claim:
        return Driver(experiment, request, claim).run()


def already_finished(experiment: Experiment, request: Request) -> int:
    """The same command again on a finished run: the closing table, and what MLflow may still be owed."""
    notes: tuple[str, ...] = (f"{experiment.name} is finished; nothing to do.",)
    if owes(experiment):
        outcome = experiment.outcome
        assert outcome is not None
        with Claim.acquire(experiment.run_dir, say=say):
            tracker = Tracker(experiment, request.runs_dir, say)
            tracker.open()
            notes += pending(tracker.close(outcome))
    show_closing(experiment, request, None, notes)
    return DONE


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cache_dir(runs_dir: Path) -> Path:
    """Packed corpora and tokenizers, shared by the runs of a folder."""
    return runs_dir / ".cache"


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
    if standing != experiment.fingerprint and not experiment.extended:
        raise UserError(
            f"run {experiment.name!r} was begun meanwhile with another configuration. Choose another --name."
        )


class Driver:
    """One claim of one run, from the claim to the closing table."""

    def __init__(self, experiment: Experiment, request: Request, claim: Claim):
        self.experiment = experiment
        self.config = experiment.config
        self.run_dir = experiment.run_dir
        self.request = request
        self.generation = claim.generation
        self.stop_reason: str | None = None
        self._asked = False
        self._nothing_to_save = False
        self._offsets = {METRICS: 0, NOTES: 0}
        self._started = time.monotonic()
        self.display = Display(
            f"{experiment.name}: {self.config.preset} in {self.run_dir}",
            None,
            terminal=sys.stdout.isatty() and not request.json,
            json=request.json,
        )

    def run(self) -> int:
        with self.display, self._stopping_on_signals():
            with self._leaving_at_once():
                data = prepare(self.config, cache_dir(self.request.runs_dir), progress=self.display.packing)
            check_model(self.config, data.tokenizer.vocab_size)
            self._clean_up_after_the_last_claim()
            # Only now: a text that is refused leaves no store behind. It opens while Ray starts.
            tracker = Tracker(self.experiment, self.request.runs_dir, self.display.note)
            self.display.total_steps = total_steps(self.config, data)
            write_identity(
                self.experiment,
                total_steps=self.display.total_steps,
                data=data.report,
                tokenizer=data.tokenizer.fingerprint,
            )
            self.display.status("starting Ray")
            log = self.run_dir / "logs" / "ray.log"
            # Signals a second time: ray.init takes SIGTERM for itself, and would end the driver where it stands.
            with (
                ray_cluster(self.config.workers, verbose=self.request.verbose, log_path=log) as ray,
                self._stopping_on_signals(),
            ):
                if self.stop_reason:
                    raise KeyboardInterrupt(self.stop_reason)
                share = resources_per_worker(ray, self.config.workers, self.config.device)
                self.display.status("opening MLflow")
                tracker.open()
                self.display.status("starting the workers")
                with ended_truthfully(tracker):
                    error = self._watch(Fit(self._job(share), self.config.workers, share))
            with ended_truthfully(tracker):
                return self._conclude(tracker, error)

    # ---- while it runs --------------------------------------------------------------------------

    def _job(self, share: Resources) -> dict[str, Any]:
        # Ray's share decides for all workers alike: two workers on a box with one GPU compute on the CPU.
        device = "cpu" if self.config.device == "auto" and share.gpus_there and not share.gpus else self.config.device
        return {
            "config": self.config.model_copy(update={"device": device}).model_dump(mode="json"),
            "run_dir": str(self.run_dir),
            "cache_dir": str(cache_dir(self.request.runs_dir)),
            "generation": self.generation,
            "threads": share.cpus,
            "tracking": {"mlflow_run_id": self.experiment.identity["mlflow_run_id"]},
        }

    def _watch(self, fit: Fit) -> BaseException | None:
        """Show and send on what the workers record until they are done; their error, if they had one."""
        (self.run_dir / OUTCOME).unlink(missing_ok=True)  # only now: until here the last ending stands
        fit.start()
        while fit.is_alive() and not self._waits_in_vain():
            fit.join(POLL_S)
            if self.stop_reason and not self._asked:
                self._asked = True
                request_stop(self.run_dir, self.generation, self.stop_reason)
                self.display.note(f"{self.stop_reason}: stopping at the next step boundary (again to stop at once)")
            self._show_news()
        self._show_news()
        return fit.error

    def _waits_in_vain(self) -> bool:
        """Whether the run ended a while ago: a worker that failed alone leaves the others waiting for it for ever."""
        path = self.run_dir / OUTCOME
        return path.exists() and time.time() - path.stat().st_mtime > LAST_WORDS_S

    def _show_news(self) -> None:
        for row in self._news(METRICS, read_rows(self.run_dir / METRICS, offset=self._offsets[METRICS])):
            self.display.row(row)
        for text in self._news(NOTES, read_notes(self.run_dir, self._offsets[NOTES])):
            self.display.note(text)
        self.display.tick()

    def _news(self, name: str, items: Iterator[tuple[T, int]]) -> Iterator[T]:
        """What has come into a file since the last look; `items` is not begun where nothing has."""
        path = self.run_dir / name
        if path.exists() and path.stat().st_size > self._offsets[name]:
            for item, end in items:
                self._offsets[name] = end
                yield item

    def _clean_up_after_the_last_claim(self) -> None:
        (self.run_dir / STOP_REQUEST).unlink(missing_ok=True)
        if self.experiment.extended:  # before the identity says so, or a kill would leave the larger run finished
            (self.run_dir / OUTCOME).unlink(missing_ok=True)
        shutil.rmtree(self.run_dir / ".ray", ignore_errors=True)
        for name in self._offsets:
            path = self.run_dir / name
            self._offsets[name] = path.stat().st_size if path.exists() else 0

    @contextlib.contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """The first signal asks the workers to stop and save; the second ends the driver, and the workers with it."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            if self.stop_reason:
                os._exit(128 + number)
            self.stop_reason = signal.Signals(number).name
            if self._nothing_to_save:
                raise KeyboardInterrupt(self.stop_reason)

        before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _leaving_at_once(self) -> Iterator[None]:
        """While text is packed there is nothing to save and nobody to ask: a signal is KeyboardInterrupt."""
        self._nothing_to_save = True
        try:
            yield
        finally:
            self._nothing_to_save = False

    # ---- afterwards -----------------------------------------------------------------------------

    def _conclude(self, tracker: Tracker, error: BaseException | None) -> int:
        outcome = self.experiment.outcome
        if outcome is None:
            reason = f"the workers died {WORKER_RESTARTS + 1} times; the last time: {brief(error)}"
            outcome = {"state": "failed", "reason": reason}
            write_atomically(self.run_dir / OUTCOME, json.dumps(outcome) + "\n")
        shutil.rmtree(self.run_dir / ".ray", ignore_errors=True)
        self.display.status("drawing the plots")
        self._draw()
        if outcome["state"] == "failed":
            tracker.close(outcome)
            raise failure(outcome["reason"])
        self.display.status("handing the rest to MLflow")
        delivered = tracker.close(outcome)
        self.display.close()
        notes = pending(delivered)
        show_closing(self.experiment, self.request, time.monotonic() - self._started, notes)
        return DONE if outcome["state"] == "finished" else STOPPED

    def _draw(self) -> None:
        """The pictures are worth a note when they fail, not the ending of a training that is done."""
        try:
            draw(self.run_dir, self.experiment.name)
        except Exception as error:
            self.display.note(f"the plots could not be drawn: {type(error).__name__}: {error}")


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


class Fit(threading.Thread):
    """Ray Train's blocking `fit` on a thread, so that the main thread keeps the signals and the terminal."""

    def __init__(self, job: dict[str, Any], workers: int, share: Resources):
        super().__init__(name="ray-train", daemon=True)
        self.job, self.workers, self.share = job, workers, share
        self.error: BaseException | None = None

    def run(self) -> None:
        from orchestrator.worker import work

        try:
            build_trainer(work, self.job, workers=self.workers, cpus=self.share.cpus, gpus=self.share.gpus).fit()
        except Exception as error:  # the driver decides, by the outcome the workers wrote
            self.error = error


def draw(run_dir: Path, name: str) -> None:
    """plots/ and the readable samples, from the record alone."""
    from orchestrator.plots import plot_curves
    from orchestrator.samples import render_samples

    plot_curves(run_dir / "metrics.jsonl", run_dir / "plots" / "curves.png", name)
    render_samples(run_dir / "samples")


def show_closing(experiment: Experiment, request: Request, seconds: float | None, notes: tuple[str, ...]) -> None:
    closing = closing_of(request.runs_dir, experiment.name, seconds=seconds, notes=notes)
    print_json(closing.to_json()) if request.json else closing_table(closing)


def pending(delivered: Delivered | None) -> tuple[str, ...]:
    """A note about rows that MLflow has not got yet."""
    if delivered is None or not delivered.pending:
        return ()
    return (f"{delivered.pending} rows wait for MLflow ({delivered.problem}); the same command sends them later.",)


def failure(reason: str) -> Exception:
    """The exception, and so the exit code, that the last word of a run means."""
    kind, _, text = reason.partition(": ")
    if kind == "bad_input":
        return UserError(text)
    return TrainingFailed(text if kind == "training_failed" else reason)


def brief(error: BaseException | None) -> str:
    """The last line of an error that may carry another process's whole traceback."""
    lines = str(error).strip().splitlines() if error else []
    return lines[-1].strip() if lines else "no reason given"


def check_model(config: RunConfig, vocab_size: int) -> None:
    """Refuse before Ray starts a model whose embedding is too small or whose weights this machine cannot hold."""
    table = config.model.vocab_size or vocab_size
    if table < vocab_size:
        raise UserError(
            f"model.vocab_size ({table}) is smaller than the tokenizer's vocabulary ({vocab_size}): "
            f"raise it to at least {vocab_size}, or leave it out."
        )
    if os.environ.get("RAY_ADDRESS"):
        return
    parameters = closed_form_parameters(config.model, table)
    needed = parameters * BYTES_PER_VALUE * config.workers
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"the model has {count(parameters)} parameters: its weights alone need {size(needed)} in "
            f"{config.workers} worker{'s' if config.workers > 1 else ''}, and this machine has {size(there)} of "
            "memory. Lower model.d_model, model.n_layers or --workers."
        )


def check_device(config: RunConfig) -> None:
    """Refuse early what this machine's device cannot compute; on a cluster the workers find out."""
    certain = config.precision.compute == "fp32" and config.device in ("auto", "cpu")
    if certain or os.environ.get("RAY_ADDRESS"):
        return
    from trainers.devices import check_precision, resolve_device

    check_precision(config.precision, resolve_device(config.device))
