"""The driver of `orchestrate train`: claim the run, start Ray, watch the workers, tell MLflow, end truthfully.

The workers write the record (metrics.jsonl), the checkpoints and the outcome; the driver only reads them, so it may
be killed and started again at any time.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.claimed import claimed, say
from orchestrator.display import Display
from orchestrator.ending import brief, draw, ended_truthfully, failure, pending, show_closing
from orchestrator.experiment import OUTCOME, Experiment, Request, cache_dir, settle, write_atomically, write_identity
from orchestrator.news import News
from orchestrator.out_of_memory import accident_of, explain, shrunk
from orchestrator.plan import planned_phases, warmups_beyond_epochs
from orchestrator.preflight import check_device, check_model
from orchestrator.ray_cluster import Resources, ray_cluster, resources_per_worker
from orchestrator.ray_trainer import WORKER_RESTARTS, Fit, while_it_gets_further
from orchestrator.signals import StopSignals
from orchestrator.tracker import OpeningStore, Tracker, owes
from orchestrator.worker import OUT_OF_MEMORY
from trainers.claim import Claim
from trainers.config import RunConfig
from trainers.context import STOP_REQUEST, request_stop
from trainers.data.prepare import data_hashes, prepare
from trainers.errors import TrainingFailed
from trainers.identity import saved_step
from trainers.memory.limit import is_out_of_memory

if TYPE_CHECKING:
    from trainers.memory.prediction import Device

POLL_S = 0.2  # how often the driver looks at the record
LAST_WORDS_S = 30.0  # for the workers to end by themselves once one of them has said how the run ended
FITS_APART = 1000  # numbers of fits between two sizes of the micro-batch, so that none comes twice
DONE, STOPPED = 0, 75


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
            tracker = Tracker(experiment, OpeningStore(request.runs_dir), say)
            tracker.open()
            notes += pending(tracker.close(outcome))
    show_closing(experiment, request, None, notes)
    return DONE


class Driver:
    """One claim of one run, from the claim to the closing table."""

    def __init__(self, experiment: Experiment, request: Request, claim: Claim):
        self.experiment = experiment
        self.config = experiment.config
        self.run_dir = experiment.run_dir
        self.request = request
        self.generation = claim.generation
        self.vocab_size = 0
        self.device: Device = "cpu"
        self.signals = StopSignals()
        self.news = News(self.run_dir)
        self._asked = False
        self._started = time.monotonic()
        self.display = Display(
            f"{experiment.name}: {self.config.preset} in {self.run_dir}",
            None,
            terminal=sys.stdout.isatty() and not request.json,
            json=request.json,
        )

    def run(self) -> int:
        with self.display, self.signals.heard():
            with self.signals.leaving_at_once():  # while text is packed
                data = prepare(
                    self.config, cache_dir(self.request.runs_dir), run_dir=self.run_dir, progress=self.display.packing
                )
            check_model(self.config, data.tokenizer.vocab_size)
            self.vocab_size = data.tokenizer.vocab_size
            self._clean_up_after_the_last_claim()
            # Only now: a text that is refused leaves no store behind. It opens while Ray starts.
            tracker = Tracker(self.experiment, OpeningStore(self.request.runs_dir), self.display.note)
            phases = planned_phases(self.config, data)
            self.display.total_steps = sum(phase.steps for phase in phases)
            for note in warmups_beyond_epochs(self.config, phases):
                self.display.note(note)
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
                self.signals.heard(),
            ):
                self.signals.leave_if_asked()
                share = resources_per_worker(ray, self.config.workers, self.config.device)
                self.device = "cuda" if share.gpus else "cpu"
                self.display.status("opening MLflow")
                tracker.open()
                tracker.end_abandoned()
                self.display.status("starting the workers")
                with ended_truthfully(tracker):
                    error = self._train(share)
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
            "memory_limit": self.request.memory_limit,
            "tracking": {"mlflow_run_id": self.experiment.identity["mlflow_run_id"]},
        }

    def _train(self, share: Resources) -> BaseException | None:
        """Train until the run is over or the workers die again and again at one place; their last error, if any."""
        first = 0
        while True:
            error = self._fit(share, first)
            self._told_of_memory(error)
            if not self._shrinks():
                return error
            first += FITS_APART

    def _fit(self, share: Resources, first: int) -> BaseException | None:
        """Fits, numbered from `first`, with the present configuration."""
        (self.run_dir / OUTCOME).unlink(missing_ok=True)  # only now: until here the last ending stands
        job = self._job(share)
        return while_it_gets_further(
            lambda number: self._watch(Fit(job, self.config.workers, share, first + number)),
            lambda: saved_step(self.run_dir),
            over=lambda: self.experiment.outcome is not None or self.signals.reason is not None,
        )

    def _told_of_memory(self, error: BaseException | None) -> None:
        """Workers that the system killed for their memory could not say so; Ray does."""
        if (
            self.experiment.outcome is None
            and error is not None
            and not self.signals.reason
            and is_out_of_memory(error)
        ):
            outcome = {"state": "failed", "reason": f"{OUT_OF_MEMORY}: {brief(error)}"}
            write_atomically(self.run_dir / OUTCOME, json.dumps(outcome) + "\n")

    def _shrinks(self) -> bool:
        """Whether the run ran out of memory and goes on with half the micro-batch: from now on `self.config` has it."""
        accident = accident_of(self.experiment.outcome)
        if accident is None or not self.request.shrinks or self.signals.reason:
            return False
        smaller = shrunk(self.config)
        if smaller is None:
            return False
        self.display.note(
            f"out of memory at {self.config.micro_sequences} rows at a time: going on from step "
            f"{saved_step(self.run_dir)} with {smaller.micro_sequences} rows, {smaller.accumulation} micro-batches a "
            f"step and the same {smaller.sequences_per_step} rows in all"
        )
        hashes = data_hashes(smaller, cache_dir(self.request.runs_dir))
        request = replace(self.request, name=self.experiment.name, fresh=False)
        self.experiment = settle(smaller, request, hashes)
        self.config = smaller
        write_identity(self.experiment)
        return True

    def _watch(self, fit: Fit) -> BaseException | None:
        """Show and send on what the workers record until they are done; their error, if they had one."""
        fit.start()
        while fit.is_alive() and not self._waits_in_vain():
            fit.join(POLL_S)
            if self.signals.reason and not self._asked:
                self._asked = True
                request_stop(self.run_dir, self.generation, self.signals.reason)
                self.display.note(f"{self.signals.reason}: stopping at the next step boundary (again to stop at once)")
            self._show_news()
        self._show_news()
        return fit.error

    def _waits_in_vain(self) -> bool:
        """Whether the run ended a while ago: a worker that failed alone leaves the others waiting for it for ever."""
        path = self.run_dir / OUTCOME
        return path.exists() and time.time() - path.stat().st_mtime > LAST_WORDS_S

    def _show_news(self) -> None:
        for row in self.news.rows():
            self.display.row(row)
        for text in self.news.notes():
            self.display.note(text)
        self.display.tick()

    def _clean_up_after_the_last_claim(self) -> None:
        (self.run_dir / STOP_REQUEST).unlink(missing_ok=True)
        if self.experiment.extended:  # before the identity says so, or a kill would leave the larger run finished
            (self.run_dir / OUTCOME).unlink(missing_ok=True)
        shutil.rmtree(self.run_dir / ".ray", ignore_errors=True)
        self.news.skip()

    # ---- afterwards -----------------------------------------------------------------------------

    def _conclude(self, tracker: Tracker, error: BaseException | None) -> int:
        outcome = self.experiment.outcome
        if outcome is None:
            outcome = self._outcome_without_last_words(error)
            write_atomically(self.run_dir / OUTCOME, json.dumps(outcome) + "\n")
        shutil.rmtree(self.run_dir / ".ray", ignore_errors=True)
        self.display.status("drawing the plots")
        self._draw()
        if outcome["state"] == "failed":
            tracker.close(outcome)
            if accident_of(outcome) is not None:
                raise TrainingFailed(explain(self.experiment, self.request, self.vocab_size, self.device, outcome))
            raise failure(outcome["reason"])
        self.display.status("handing the rest to MLflow")
        delivered = tracker.close(outcome)
        self.display.close()
        notes = pending(delivered)
        show_closing(self.experiment, self.request, time.monotonic() - self._started, notes)
        return DONE if outcome["state"] == "finished" else STOPPED

    def _outcome_without_last_words(self, error: BaseException | None) -> dict[str, Any]:
        """How the run ended whose workers died before they could say so."""
        if self.signals.reason:  # whoever stopped us stopped them too: it goes on from the last checkpoint
            return {"state": "stopped", "reason": self.signals.reason}
        times = f"{WORKER_RESTARTS + 1} times without a new checkpoint"
        return {"state": "failed", "reason": f"the workers died {times}; the last time: {brief(error)}"}

    def _draw(self) -> None:
        """The pictures are worth a note when they fail, not the ending of a training that is done."""
        try:
            draw(self.run_dir, self.experiment.name)
        except Exception as error:
            self.display.note(f"the plots could not be drawn: {type(error).__name__}: {error}")
