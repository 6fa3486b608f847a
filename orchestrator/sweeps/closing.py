"""Closer: ends what was trained in MLflow too, behind Tune's back, and gives its disk back."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

from orchestrator.experiment import OUTCOME
from orchestrator.sweeps.history import History, StopReason, Trial, seed_names
from orchestrator.sweeps.settings import SweepSettings
from orchestrator.sweeps.training import EXPLOITED, SeedTraining

LAST_WORDS_S = 60.0  # for a stopped training to write its outcome
STANDS_BACK_S = 0.5  # the closing of a trial, for the beginning of the next: a slot waits for that


@dataclass
class Running:
    """A trial that Tune has been given."""

    trial: Trial
    seeds: list[SeedTraining]
    began: float = field(default_factory=time.monotonic)
    stop: StopReason | None = None
    """why it was told to stop"""
    silent: bool = False
    """it trains no more, so what it has not written by now it never will"""

    def tell_to_stop(self) -> None:
        assert self.stop is not None
        for seed in self.seeds:
            seed.request_stop(self.stop)


class Closer:
    """Takes what is over from the desk and closes one after another on a thread of its own.

    Of what will never go on only the best keeps its checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        history: History,
        settings: SweepSettings,
        best: Callable[[], Trial | None],
        say: Callable[[str], None],
    ):
        """`folder`: the sweep's; `best`: the completed trial that keeps its checkpoints."""
        self.slots_at_work = threading.Event()
        """clear between the end of a trial and the word on what follows it"""
        self._folder, self._history, self._settings = folder, history, settings
        self._best, self._say = best, say
        self._kept: Trial | None = None
        """of the completed trials the one that still has its checkpoints"""
        self._over: Queue[tuple[Running, str] | None] = Queue()
        self._thread = threading.Thread(target=self._close_all, name="trial-closer", daemon=True)
        self._thread.start()

    def put(self, running: Running, reason: str) -> None:
        """It trains no more, at least in this command; `reason`: a StopReason or EXPLOITED."""
        self._over.put((running, reason))

    def finish(self) -> None:
        """Wait until all is closed."""
        self._over.put(None)
        self._thread.join()
        drop_what_lost(self._folder, self._history, self._settings.seeds, self._best())

    # ---- the thread -----------------------------------------------------------------------------

    def _close_all(self) -> None:
        while (item := self._over.get()) is not None:
            self.slots_at_work.wait(STANDS_BACK_S)
            self._close(*item)

    def _close(self, running: Running, reason: str) -> None:
        deadline = time.monotonic() + LAST_WORDS_S
        while not running.silent and time.monotonic() < deadline:
            if all((seed.folder / OUTCOME).exists() for seed in running.seeds):
                break
            time.sleep(0.05)
        ending = running.trial.ending
        for seed in running.seeds:
            try:
                seed.close(reason, ending)
            except Exception as error:
                self._say(f"{seed.folder.name} could not be closed: {type(error).__name__}: {error}")
        if reason == EXPLOITED or (ending is not None and reason != "completed"):
            drop_checkpoints(seed.folder for seed in running.seeds)
        elif reason == "completed":
            self._keep_best(running.trial)

    def _keep_best(self, trial: Trial) -> None:
        """Of the trials that went the whole way only the best keeps its checkpoints."""
        best = self._best()
        others = list(self._history.ended()) if self._kept is None else [self._kept, trial]
        self._kept = best
        for other in others:
            if other is not best and other.ending is not None and other.ending.reason == "completed":
                drop_checkpoints(_folders(self._folder, other, self._settings.seeds, len(other.lineage)))


def drop_what_lost(folder: Path, history: History, seeds: int, best: Trial | None) -> None:
    """No training that will never go on keeps its checkpoints but the best: also where a kill came between the end of
    one and its closing. `folder`: the sweep's."""
    for trial in history.trials.values():
        goes_on = trial.ending is None or trial is best
        for segment in range(len(trial.lineage) + (0 if goes_on else 1)):
            drop_checkpoints(_folders(folder, trial, seeds, segment))


def drop_checkpoints(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _folders(folder: Path, trial: Trial, seeds: int, segment: int) -> list[Path]:
    return [folder / name for name in seed_names(trial.number, seeds, segment)]
