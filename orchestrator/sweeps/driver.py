"""The driver of `orchestrate tune`: claim the sweep, start Ray, let Tune place trials, tell MLflow, end truthfully."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.claimed import make_folder, say
from orchestrator.experiment import cache_dir
from orchestrator.memory_limit import limit_for
from orchestrator.plan import packed_tokens
from orchestrator.preflight import check_device, check_model
from orchestrator.ray_cluster import ray_cluster
from orchestrator.signals import StopSignals
from orchestrator.sweeps.desk import TrialDesk, best_of
from orchestrator.sweeps.foreseen import TrialFootprints
from orchestrator.sweeps.history import StopReason
from orchestrator.sweeps.journal import JOURNAL, Journal, read_history
from orchestrator.sweeps.memory import Allowed, Footprints, allowed, unlooked
from orchestrator.sweeps.parent import ParentRun, is_told, open_parent
from orchestrator.sweeps.population import Population
from orchestrator.sweeps.refused import enter_refused
from orchestrator.sweeps.rules import build_rule
from orchestrator.sweeps.searchers import build_searcher
from orchestrator.sweeps.settings import SweepSettings, build_settings
from orchestrator.sweeps.slots import Slots, slots_of, starts_ahead
from orchestrator.sweeps.sweep import (
    Sweep,
    SweepRequest,
    check_batches,
    notes_of,
    settle_name,
    sweep_fields,
    tokens_of_phases,
    write_sweep,
)
from orchestrator.sweeps.table import SweepDisplay
from orchestrator.sweeps.training import open_trial, take_over
from orchestrator.sweeps.trials import in_tokens
from orchestrator.sweeps.tuning import AHEAD, run_trials
from orchestrator.tracker import OpeningStore
from search_spaces.precisions import Device
from search_spaces.space import Space
from trainers.claim import Claim, Guard
from trainers.config import RunConfig
from trainers.data.prepare import data_hashes, prepare
from trainers.data.types import PreparedData
from trainers.errors import TrainingFailed

if TYPE_CHECKING:
    from orchestrator.tracking import EndState

POLL_S = 0.25
GPU_NOTED_S = 10.0  # between two notes of the GPU time so far: what a kill of the driver may take from the count
DONE, STOPPED = 0, 75


def tune(
    base: RunConfig,
    draft: dict[str, Any],
    space: Space,
    device: Device,
    request: SweepRequest,
    taken_out: tuple[tuple[str, str], ...] = (),
) -> int:
    """Search `space` around `base`, from wherever that sweep stands. `draft`: SweepSettings without what the text says.

    Exit code: 0 done, 75 resumable. Raises UserError (2) before anything is made, TrainingFailed (3) where no trial
    could be completed.
    """
    check_device(base)
    hashes = data_hashes(base, cache_dir(request.runs_dir))
    signals = StopSignals()
    held: dict[str, Any] | None = None
    with SweepDisplay(request.json) as display, signals.heard():
        with signals.leaving_at_once():
            data = prepare(base, cache_dir(request.runs_dir), progress=display.packing)
        check_model(base, data.tokenizer.vocab_size)
        tokens = tokens_of_phases(base, data)
        check_batches(base, space, [[packed_tokens(source) for source in phase.sources] for phase in data.phases])
        typed, base = base, in_tokens(base, tokens)
        settings = build_settings(draft, space.to_json(), sum(tokens))
        fields = sweep_fields(base, settings, hashes)
        name, folder = settle_name(request, base.preset, settings, fields)
        shared = {"data": data.report, "tokenizer": data.tokenizer.fingerprint}
        sweep = Sweep(
            name, folder, request.runs_dir, base, settings, space, fields, hashes, device, taken_out,
            typed_runs_dir=request.typed_runs_dir, shared_identity=shared,
        )  # fmt: skip
        if is_finished(sweep):
            code = already_finished(sweep, display)
        else:
            with claimed_sweep(sweep) as claim:
                code = SweepDriver(sweep, data, request, claim, signals, display).run()
        winner = best_of(read_history(sweep.folder / JOURNAL).ended(), settings)
        trains = request.then_train is not None and code == DONE and winner is not None
        if trains:
            held, display.document = display.document, None
    if trains:
        from orchestrator.sweeps.full_training import train_winner

        assert winner is not None
        return train_winner(sweep, winner, typed, data, request, held)
    return code


def is_finished(sweep: Sweep) -> bool:
    """Whether nothing is left to train, and MLflow has all of it."""
    done = sweep.identity.get("finished") == sweep.settings.trials
    return done and is_told(sweep, read_history(sweep.folder / JOURNAL))


def already_finished(sweep: Sweep, display: SweepDisplay) -> int:
    """The same command again on a finished sweep: what was found."""
    from orchestrator.sweeps.stored import read_sweep

    display.note(f"{sweep.name} is finished; nothing to do. More --trials go on with it.")
    display.close(read_sweep(sweep.runs_dir, sweep.name), sweep.folder / "report.html")
    return DONE


@contextlib.contextmanager
def claimed_sweep(sweep: Sweep) -> Iterator[Claim]:
    """The claim on the sweep's folder for the life of the command; a folder made for nothing goes away again."""
    made = make_folder(sweep.folder)
    try:
        with Claim.acquire(sweep.folder, say=say) as claim:
            yield claim
    except BaseException:
        if made and not _holds_something(sweep):
            shutil.rmtree(sweep.folder, ignore_errors=True)
        raise


def _holds_something(sweep: Sweep) -> bool:
    """Whether a trial was asked for, or MLflow knows of the sweep."""
    journal = sweep.folder / JOURNAL
    return (journal.exists() and journal.stat().st_size > 0) or "mlflow_run_id" in sweep.identity


class SweepDriver:
    """One claim of one sweep, from the claim to the closing table."""

    def __init__(
        self,
        sweep: Sweep,
        data: PreparedData,
        request: SweepRequest,
        claim: Claim,
        signals: StopSignals,
        display: SweepDisplay,
    ):
        self.sweep = sweep
        self.data = data
        self.request = request
        self.signals = signals
        self.display = display
        self.guard = Guard.begin_attempt(sweep.folder, claim.generation)
        self._tune_folder = sweep.folder / ".ray" / f"claim-{claim.generation}"
        self._began = self._looked = time.monotonic()
        self._gpu_s = sweep.identity.get("gpu_s", 0.0)
        """for which trials of this sweep have held GPUs, the earlier commands' included"""
        self._gpu_noted = time.monotonic()

    def run(self) -> int:
        sweep, display = self.sweep, self.display
        opening = OpeningStore(sweep.runs_dir)
        journal = Journal(sweep.folder / JOURNAL, self.guard)
        write_sweep(sweep)
        display.begin(sweep, journal.history)
        display.status("starting Ray")
        log = sweep.folder / "logs" / "ray.log"
        ahead = AHEAD if starts_ahead(sweep, self.request) else ()
        cluster = ray_cluster(sweep.base.workers, verbose=self.request.verbose, log_path=log, ahead=ahead)
        with cluster as ray, self.signals.heard():
            self.signals.leave_if_asked()
            slots = slots_of(ray, sweep, self.request)
            self.sweep = sweep = self._within_memory(slots)
            for note in notes_of(sweep.base, sweep.settings, sweep.space):
                display.note(note)
            display.status("opening MLflow")
            parent = open_parent(sweep, opening, slots.count, display.note)
            population = Population(sweep.settings, sweep.space) if sweep.settings.scheduler == "pbt" else None
            desk = TrialDesk(
                journal,
                sweep.settings,
                build_searcher(sweep.settings, sweep.space),
                build_rule(sweep.settings),
                milestones_of(sweep.settings),
                lambda trial: open_trial(self.sweep, trial, opening, parent.run_id, display.note),
                display.note,
                population,
                lambda exploit: take_over(self.sweep, journal.history, exploit),
                lambda trial: enter_refused(self.sweep, trial, opening, parent.run_id),
            )
            with parent.ended_truthfully():
                parent.settle(journal.history)
                error = self._watch(Tuning(desk, slots, self._tune_folder, bool(ahead)), desk, slots)
                display.status("closing the trials")
                desk.finish()
                if error is not None:
                    raise error
                return self._conclude(desk, parent)

    def _within_memory(self, slots: Slots) -> Sweep:
        """The sweep without the cells that cannot be trained, decided once in its life.

        KeyboardInterrupt where a signal comes meanwhile.
        """
        folder, vocab_size = cache_dir(self.sweep.runs_dir), self.data.tokenizer.vocab_size
        asked = self.request.memory_limit
        told = TrialFootprints(vocab_size, folder, self.display.note)
        sweep = replace(self.sweep, share=slots.share, memory_limit=asked, footprints=told)
        if "memory" not in sweep.identity:
            if why := unlooked(asked):
                self.display.note(why)
                return sweep
            with self.signals.leaving_at_once():
                found = self._allowed(sweep, slots, Footprints(vocab_size, sweep.device, folder))
            write_sweep(replace(sweep, taken_out=(*sweep.taken_out, *found.taken_out)), memory=found.to_json())
            self.signals.leave_if_asked()
        left = Allowed.from_json(sweep.identity["memory"])
        return replace(
            sweep,
            space=left.space,
            taken_out=(*sweep.taken_out, *left.taken_out),
            micro_limit=left.micro_limit,
            memory_limit=asked or left.limit_bytes,
        )

    def _allowed(self, sweep: Sweep, slots: Slots, footprints: Footprints) -> Allowed:
        asked = self.request.memory_limit
        gpu_share = min(1.0, slots.gpus_per_trial / sweep.base.workers or 1.0)
        limit = limit_for(sweep.device, asked, slots.count * sweep.base.workers, gpu_share)
        found = allowed(
            sweep.base,
            sweep.space,
            self.data,
            limit,
            footprints,
            device=sweep.device,
            threads=sweep.settings.cpus_per_trial,
            cache_dir=cache_dir(sweep.runs_dir),
            say=self.display.note,
            is_here=not os.environ.get("RAY_ADDRESS"),
        )
        return found if asked or gpu_share == 1.0 else replace(found, limit_bytes=limit.bytes)

    # ---- while it runs --------------------------------------------------------------------------

    def _watch(self, tuning: Tuning, desk: TrialDesk, slots: Slots) -> BaseException | None:
        self._looked = time.monotonic()
        tuning.start()
        while tuning.is_alive():
            tuning.join(POLL_S)
            if self.signals.reason and desk.closing is None:
                self.display.note(f"{self.signals.reason}: the trials stop at their next step (again to stop at once)")
                desk.close("user")
            elif desk.closing is None and not desk.trained and (spent := self._spent(desk)):
                self.display.note(f"{spent}: the trials stop at their next step; the same command with more goes on")
                desk.close("budget")
            self.display.tick(desk)
            self._count_gpu_time(slots.gpus_per_trial * len(desk.running))
        return tuning.error

    def _count_gpu_time(self, held: float) -> None:
        """So many GPUs were held since the last look. A driver that is killed has noted all but the last seconds."""
        now = time.monotonic()
        self._gpu_s += held * (now - self._looked)
        self._looked = now
        if held and now - self._gpu_noted >= GPU_NOTED_S:
            self._gpu_noted = now
            write_sweep(self.sweep, gpu_s=self._gpu_s)

    def _spent(self, desk: TrialDesk) -> str | None:
        """Which of the sweep's budgets is used up."""
        seconds, request = time.monotonic() - self._began, self.request
        if request.max_seconds is not None and seconds >= request.max_seconds:
            return f"--max-time is used up ({seconds:.0f} s)"
        if request.max_tokens is not None and desk.tokens >= request.max_tokens:
            return f"--max-tokens is used up ({desk.tokens:,})"
        if request.max_gpu_hours is not None and self._gpu_s / 3600 >= request.max_gpu_hours:
            return f"--max-gpu-hours is used up ({self._gpu_s / 3600:.2f})"
        return None

    # ---- afterwards -----------------------------------------------------------------------------

    def _conclude(self, desk: TrialDesk, parent: ParentRun) -> int:
        shutil.rmtree(self.sweep.folder / ".ray", ignore_errors=True)
        best = desk.best()
        self._tell(desk, parent)
        failed = desk.closing is None and best is None
        state: EndState = "FAILED" if failed else "FINISHED" if desk.closing is None else "KILLED"
        reason: StopReason = "error" if failed else desk.closing or "completed"
        parent.finish(state, reason)
        self._report(parent)
        if failed:
            messages = sorted({t.ending.message or t.ending.reason for t in desk.history.ended() if t.ending})
            raise TrainingFailed(f"no trial of {self.sweep.name} was completed: {'; '.join(messages)[:600]}")
        if desk.closing is not None:
            return STOPPED
        write_sweep(self.sweep, finished=self.sweep.settings.trials)
        return DONE

    def _tell(self, desk: TrialDesk, parent: ParentRun) -> None:
        """MLflow, and the sweep's own file, what it has come to."""
        trials = desk.history.trials.values()
        train_s = sum(trial.ending.train_s if trial.ending else trial.train_s for trial in trials)
        seconds = time.monotonic() - self._began + self.sweep.identity.get("wall_s", 0.0)
        write_sweep(self.sweep, wall_s=seconds, gpu_s=self._gpu_s)
        parent.settle(desk.history)
        parent.tell(desk.history, desk.best(), seconds, train_s, desk.tokens)

    def _report(self, parent: ParentRun) -> None:
        """The closing table, the page and the figures, from MLflow alone; worth a note when they fail, no more."""
        from orchestrator.sweeps.figures import draw_search_figures
        from orchestrator.sweeps.report_html import write_page
        from orchestrator.sweeps.stored import read_sweep

        self.display.status("drawing the figures")
        try:
            results = read_sweep(self.sweep.runs_dir, self.sweep.name)
            page, figures = self.sweep.folder / "report.html", self.sweep.folder / "plots"
            draw_search_figures(results, figures)
            write_page(results, page)
            parent.run.log_artifact(figures, "plots")
            parent.run.log_artifact(page)
        except Exception as error:
            self.display.note(f"the report could not be drawn: {type(error).__name__}: {error}")
        else:
            self.display.close(results, page)


class Tuning(threading.Thread):
    """Tune's blocking loop on a thread, so that the main thread keeps the signals and the terminal."""

    def __init__(self, desk: TrialDesk, slots: Slots, storage: Path, started_ahead: bool):
        super().__init__(name="ray-tune", daemon=True)
        self.desk, self.slots, self.storage, self.started_ahead = desk, slots, storage, started_ahead
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            run_trials(
                self.desk,
                points=-1,
                slots=min(self.slots.count, max(1, self.desk.left)),
                resources=self.slots.resources,
                storage=self.storage,
                started_ahead=self.started_ahead,
            )
        except Exception as error:
            self.error = error


def milestones_of(settings: SweepSettings) -> list[int]:
    """Tokens at which the seeds of a point are judged together; the last is the budget."""
    if settings.scheduler == "none":
        return [settings.tokens]
    inner = range(settings.report_every, settings.tokens, settings.report_every)
    return [*inner, settings.tokens]
