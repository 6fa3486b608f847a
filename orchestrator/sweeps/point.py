"""PointRun: a point of a sweep being trained, inside its Tune actor. No ray here, and torch only when it trains.

The seeds of a point take turns: each trains to the next milestone, where their mean is judged, and waits there. One
seed alone is judged at every evaluation. The training runs on a thread of its own; `next` hands it the word to go on
and returns what it has to say next.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.worker import OUT_OF_MEMORY, OUTCOME, attempt
from trainers.claim import Guard
from trainers.context import STOP_REQUEST, RunFolder, request_stop, requested_stop
from trainers.errors import TrainingFailed
from trainers.identity import read_json
from trainers.record import read_rows

POLL_S = 0.1
EVALUATED = "val/loss"  # what an evaluation logs, and nothing else does
TURN = "its turn is over"  # the reason of a seed that waits for the others
LEFT = "user"  # the reason where nobody asked for a stop, and the process is wanted back
LAST_WORDS_S = 120.0  # for a training that was told to stop to save where it stands

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class PointJob:
    """What an actor needs to train a point; plain values, so that Ray can carry it.

    To Tune it is one opaque value: of a dictionary it would keep statistics, a few for every number in it.
    """

    number: int
    seeds: list[dict[str, Any]]
    """a job for each seed, as `orchestrator.worker.work` takes it"""
    metrics: list[str]
    """the objectives"""
    milestones: list[int]
    """tokens at which several seeds are judged together; the last is the budget"""
    until: int | None = None
    """tokens at which a member of a population rests until its next round"""

    def __repr__(self) -> str:
        return f"point-{self.number}"


@dataclass
class Said:
    """An evaluation (the mean over the seeds), or, with `state`, the end."""

    tokens: int = 0
    values: list[float] = field(default_factory=list)
    spread: float = 0.0
    train_s: float = 0.0
    """seconds inside train() so far, over all seeds"""
    state: str = ""
    """finished | stopped | failed; empty while it trains"""
    reason: str = ""
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class PointRun:
    """Built where a trial begins or goes on; `next` until its `state` says how it ended, then `end`."""

    def __init__(self, job: PointJob):
        self._job = job
        self._said: queue.Queue[Said] = queue.Queue()
        self._go = threading.Event()
        self._ended = threading.Event()
        self._told_tokens = -1
        self._clock = Stopwatch()
        self._seed_alone: SeedRun | None = None
        self._thread = threading.Thread(target=self._work, name=f"point-{job.number}", daemon=True)

    def next(self) -> Said:
        """Let it go on; the next evaluation or the end. Blocks."""
        self._go.set()
        if self._thread.ident is None:
            self._thread.start()  # only now: the word to go on is for before its first evaluation, not after
        return self._said.get()

    def end(self) -> bool:
        """Stop it where it stands and wait; whether the thread is gone, so that the process can be used again."""
        self._ended.set()
        self._go.set()
        if self._thread.ident is not None:
            self._thread.join(LAST_WORDS_S)
        return not self._thread.is_alive()

    # ---- on the thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            ending = self._train()
        except BaseException as error:  # also what Ray raises into threads: the driver must hear of every end
            log.exception("point %d", self._job.number)
            message = f"{type(error).__name__}: {error}"
            ending = Said(state="failed", reason=_kind(error), message=message)
        ending.train_s = self._clock.seconds
        self._said.put(ending)

    def _train(self) -> Said:
        import trainers.loop  # noqa: F401  torch and all, before the clock runs

        seeds = [SeedRun(job, self._job.metrics, self._heard, self._ended) for job in self._job.seeds]
        alone = len(seeds) == 1
        outcome = Said(state="finished", reason="completed")
        for milestone in self._job.milestones[-1:] if alone else self._job.milestones:
            for seed in seeds:
                until = self._job.until if alone else milestone
                outcome = self._turn(seed, None if until == self._job.milestones[-1] else until)
                if alone or outcome.state == "failed" or (outcome.state == "stopped" and outcome.reason != TURN):
                    return outcome
            if not alone:
                self._tell(seeds)
                if reason := next((found for seed in seeds if (found := seed.stop_request())), None):
                    return Said(state="stopped", reason=reason)
        return outcome

    def _turn(self, seed: SeedRun, milestone: int | None) -> Said:
        """Train one seed as far as `milestone`, or to its end; how that went."""
        alone = len(self._job.seeds) == 1
        self._seed_alone = seed if alone else None
        if alone:
            self._tell([seed])  # what was recorded before a kill and perhaps never heard
        self._clock.start()
        try:
            said = seed.train(milestone)
        finally:
            self._clock.stop()
        if said.state == "finished":
            seed.foresee()
        return said

    def _heard(self) -> None:
        """A seed has been evaluated."""
        if self._seed_alone is not None:
            self._tell([self._seed_alone])

    def _tell(self, seeds: list[SeedRun]) -> None:
        """Say every evaluation that all seeds have and nobody has heard of, and wait for the word to go on."""
        for tokens, values in _common([seed.evaluations() for seed in seeds]):
            if tokens <= self._told_tokens:
                continue
            self._told_tokens = tokens
            first = [each[0] for each in values]
            spread = statistics.stdev(first) if len(first) > 1 and all(map(math.isfinite, first)) else 0.0
            means = [sum(each) / len(each) for each in zip(*values, strict=True)]
            with self._clock.paused():
                self._go.clear()
                self._said.put(Said(tokens, means, spread, self._clock.seconds))
                while not self._go.wait(POLL_S) and not any(seed.stop_request() for seed in seeds):
                    pass


class Stopwatch:
    """Seconds inside train(), without the waits for a verdict."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._before, self._since = self.seconds, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stands still inside, where it ran."""
        ran = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if ran:
                self.start()


class SeedRun:
    """One training of a point: a run like any other, in its own folder."""

    def __init__(self, job: dict[str, Any], metrics: list[str], heard: Callable[[], None], ended: threading.Event):
        self._job = job
        self._metrics = metrics
        self._heard = heard
        self._ended = ended
        self._folder = Path(job["run_dir"])
        self._reported: dict[int, tuple[float, ...]] = {}
        """tokens -> objectives, as heard here: the record's rows reach their file a moment later"""
        self._wanted = frozenset((*metrics, EVALUATED))
        self._steps: dict[int, dict[str, Any]] = {}
        """step -> tokens and what was wanted of its rows, so far as the record was read"""
        self._read = 0
        """bytes of the record"""

    def train(self, milestone: int | None) -> Said:
        """Train to its end, or to the first evaluation at or after `milestone` tokens."""
        outcome = read_json(self._folder / OUTCOME)
        if outcome and milestone and outcome["state"] == "stopped" and outcome["tokens"] >= milestone:
            return Said(state="stopped", reason=TURN)  # it came so far before a restart
        if outcome is None or outcome["state"] != "finished":
            (self._folder / OUTCOME).unlink(missing_ok=True)
            if self._job["workers"] == 1:
                attempt(self._job, lambda: self._context(milestone, died=outcome is None))
            else:
                self._train_with_workers(milestone)
            outcome = read_json(self._folder / OUTCOME)
        if outcome is None:
            raise RuntimeError(f"{self._folder} was taken over by another command")
        kind, _, text = outcome["reason"].partition(": ")
        if outcome["state"] == "failed":
            reason = {"nonfinite": "nonfinite", OUT_OF_MEMORY: "oom"}.get(kind, "error")
            return Said(state="failed", reason=reason, message=text or kind)
        return Said(state=outcome["state"], reason=outcome["reason"])

    def foresee(self) -> None:
        """Predict the memory that it took, for the driver; it has ended whatever comes of that."""
        from orchestrator.sweeps.foreseen import foresee

        foresee(self._job)

    def _train_with_workers(self, milestone: int | None) -> None:
        """Ray Train inside the trial: the workers have their own actors, and go on while an evaluation is judged."""
        from orchestrator.ray_cluster import Resources
        from orchestrator.ray_trainer import Fit

        if requested_stop(self._folder, self._job["generation"]) == TURN:  # the last turn's; the driver's word stands
            (self._folder / STOP_REQUEST).unlink(missing_ok=True)
        fit = Fit(self._job, self._job["workers"], Resources(**self._job["share"]))
        fit.start()
        while fit.is_alive():
            fit.join(POLL_S)
            self._heard()
            evaluations = self.evaluations()
            turn = TURN if milestone is not None and evaluations and evaluations[-1][0] >= milestone else None
            if (reason := self.stop_request() or turn) in (TURN, LEFT):  # the driver has said any other by itself
                request_stop(self._folder, self._job["generation"], reason)
        self._heard()
        if fit.error is not None and not (self._folder / OUTCOME).exists():
            raise fit.error

    def evaluations(self) -> list[tuple[int, tuple[float, ...]]]:
        """(tokens, objectives) of every evaluation on record, joined by step."""
        self._read_on()
        on_record = {row["tokens"]: self._objectives(row) for row in self._steps.values() if self._evaluated(row)}
        return sorted((self._reported | on_record).items())

    def _read_on(self) -> None:
        """Take in what the record has gained: it is asked several times a second while several workers train."""
        for row, end in read_rows(self._folder / "metrics.jsonl", offset=self._read):
            self._read = end
            if not self._wanted.isdisjoint(row):
                kept = {name: value for name, value in row.items() if name == "tokens" or name in self._wanted}
                self._steps[row["step"]] = kept | self._steps.get(row["step"], {})

    def _evaluated(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is an evaluation's; others have a training loss and a speed too."""
        return self._wanted <= row.keys()

    def _objectives(self, row: Mapping[str, Any]) -> tuple[float, ...]:
        return tuple(float(row[name]) for name in self._metrics)

    def _report(self, metrics: dict[str, float]) -> None:
        missing = [name for name in self._metrics if name not in metrics]
        if missing:
            raise TrainingFailed(
                f"{', '.join(missing)} is never reported; evaluations have {', '.join(sorted(metrics))}."
            )
        self._reported[int(metrics["tokens"])] = self._objectives(metrics)
        self._heard()

    def stop_request(self) -> str | None:
        """Why this training is to end, if the driver or Tune said so."""
        reason = requested_stop(self._folder, self._job["generation"])
        if reason in (None, TURN):
            return LEFT if self._ended.is_set() else None
        return reason

    def _context(self, milestone: int | None, *, died: bool) -> TrialContext:
        guard = Guard.begin_attempt(self._folder, self._job["generation"])
        context = TrialContext(self._folder, Path(self._job["cache_dir"]), guard, 0, 1, 0)
        if milestone is not None:
            context.pause_at, context.trained = milestone, saved_tokens(self._folder)
        context.heard, context.ended = self._report, self._ended
        if died and guard.attempt > 1:
            context.note("its process died: it starts again from the newest checkpoint")
        return context


class TrialContext(RunFolder):
    """A RunContext inside a Tune actor: says when it was evaluated, and stops where its turn is over."""

    pause_at: int | None = None
    """tokens"""
    trained: int = 0
    """tokens, at the last evaluation that is in a checkpoint or was reported"""
    heard: Callable[[dict[str, float]], None]
    ended: threading.Event

    def report(self, metrics: dict[str, float]) -> None:
        self.trained = int(metrics["tokens"])
        self.heard(metrics)

    def should_stop(self) -> str | None:
        if self.pause_at is not None and self.trained >= self.pause_at:
            return TURN
        return super().should_stop() or (LEFT if self.ended.is_set() else None)


def saved_tokens(folder: Path) -> int:
    """Tokens of the newest sound checkpoint of a run, where it will go on; 0 where there is none."""
    from trainers.checkpoint import CheckpointStore

    newest = CheckpointStore(folder / "checkpoints", None).latest()
    return newest.meta["progress"]["tokens"] if newest else 0


def _common(
    evaluations: list[list[tuple[int, tuple[float, ...]]]],
) -> Iterator[tuple[int, list[tuple[float, ...]]]]:
    """(tokens, the values of each seed) where every seed has been evaluated, in order."""
    seen = [dict(each) for each in evaluations]
    for tokens in sorted(set.intersection(*(set(each) for each in seen))):
        yield tokens, [each[tokens] for each in seen]


def _kind(error: BaseException) -> str:
    """oom or error."""
    from trainers.memory.limit import is_out_of_memory

    return "oom" if is_out_of_memory(error) else "error"
