"""What a person sees while a sweep runs: a live table on a terminal, a line for each ended trial anywhere else."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.console import count, duration, out, print_json
from orchestrator.display import Display
from orchestrator.sweeps.axes import short_path
from orchestrator.sweeps.closing import Running
from orchestrator.sweeps.desk import TrialDesk, best_of
from orchestrator.sweeps.history import History, Params, Trial
from orchestrator.sweeps.report import facts, print_closing
from orchestrator.sweeps.results import SweepResults
from orchestrator.sweeps.settings import SweepSettings
from orchestrator.sweeps.sweep import Sweep

ROWS = 16
"""trials on the screen: those at work, then the best"""
LINE_S = 10.0  # between plain lines while nothing ends


class SweepDisplay:
    """Lines, packing and waiting as `Display` shows them, and the table of the trials."""

    def __init__(self, json: bool):
        self._display = Display("", None, terminal=sys.stdout.isatty() and not json, json=json)
        self.packing = self._display.packing
        self.note = self._display.note
        self.status = self._display.status
        self._json = json
        self.document: dict[str, Any] | None = None
        """what --json prints when all is over, whatever ended it"""
        self._terminal = sys.stdout.isatty() and not json
        self._sweep: Sweep | None = None
        self._told, self._ended = 0, 0
        """events of the history that were told, and the trials among them that ended"""
        self._began = self._last_line = time.monotonic()
        self._tokens_before = 0
        self._view: RenderableType = Text("")

    def begin(self, sweep: Sweep, history: History) -> None:
        """The header; trials that ended before are not told again."""
        self._sweep = sweep
        settings = sweep.settings
        self._told, self._ended = len(history.events), sum(1 for _ in history.ended())
        self._tokens_before = tokens_done(history, settings)
        seeds = f" x {settings.seeds} seeds" if settings.seeds > 1 else ""
        self.note(
            f"{sweep.name}: {sweep.base.preset} over {settings.space_name} ({', '.join(sweep.space)}), "
            f"{settings.trials} trials{seeds} of {settings.tokens:,} tokens, {settings.searcher} + {settings.scheduler}"
        )
        for cell, reason in sweep.taken_out:
            self.note(f"left out: {cell} ({reason})")
        if self._ended:
            self.note(f"goes on: {self._ended} trials have ended before")

    def tick(self, desk: TrialDesk) -> None:
        """Tell what has ended, and draw the table anew."""
        sweep = self._sweep
        assert sweep is not None
        if desk.running:
            self._display.idle()
        self._tell_ended(desk)
        if self._terminal:
            self._view = table_of(sweep, desk, self.seconds_left(desk))
            self._display.view = lambda width: self._view
            self._display.tick()
        elif time.monotonic() - self._last_line > LINE_S and desk.running:
            self._last_line = time.monotonic()
            at_work = ", ".join(f"{each.trial.name} {progress_of(each.trial, sweep)}" for each in at_work_of(desk))
            self.note(f"at work: {at_work}{self._left(desk)}")

    def _tell_ended(self, desk: TrialDesk) -> None:
        assert self._sweep is not None
        events = desk.history.events[self._told :]
        self._told += len(events)
        left = self._left(desk) if events else ""
        for trial in [desk.history.trials[event.trial] for event in events if event.kind == "ended"]:
            self._ended += 1
            self._last_line = time.monotonic()
            star = " best" if desk.best() is trial else ""
            self.note(
                f"[{self._ended}/{self._sweep.settings.trials}] {trial.name} {told(trial)}{star}  "
                f"{settings_of(trial.params)}{left}"
            )

    def _left(self, desk: TrialDesk) -> str:
        left = self.seconds_left(desk)
        return "" if left is None else f"  {duration(left)} left"

    def seconds_left(self, desk: TrialDesk) -> float | None:
        """From the pace of this command so far; trials that are stopped early make it less."""
        settings, history = desk.settings, desk.history
        done = tokens_done(history, settings) - self._tokens_before
        if done <= 0:
            return None
        ended = sum(1 for _ in history.ended())
        running = sum(t.seen[-1].tokens for t in history.unfinished() if t.seen) * settings.seeds
        mean = tokens_done(history, settings, ended_only=True) / ended if ended else settings.tokens * settings.seeds
        to_do = max(0.0, (settings.trials - ended) * mean - running)
        return (time.monotonic() - self._began) / done * to_do

    def close(self, results: SweepResults, page: Path) -> None:
        """Leave the terminal as it was, and print what was found."""
        self._display.close()
        if self._json:
            self.document = facts(results)
            return
        console = out()
        console.print()
        print_closing(results, console)
        console.print(f"page: {page}", soft_wrap=True)

    def __enter__(self) -> SweepDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()
        if self.document is not None:
            print_json(self.document)


def tokens_done(history: History, settings: SweepSettings, ended_only: bool = False) -> int:
    """Tokens trained on, over all trials and seeds."""
    trials = history.ended() if ended_only else iter(list(history.trials.values()))
    return sum(trial.seen[-1].tokens for trial in trials if trial.seen) * settings.seeds


def at_work_of(desk: TrialDesk) -> list[Running]:
    return sorted(desk.running.copy().values(), key=lambda each: each.trial.number)


def table_of(sweep: Sweep, desk: TrialDesk, left: float | None) -> RenderableType:
    """The trials at work, then the best of those that ended."""
    settings = sweep.settings
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    paths = list(sweep.space)
    for name in ("trial", *(short_path(path, paths) for path in paths), "state", "tokens", settings.objective.metric):
        table.add_column(name, no_wrap=True, justify="left")
    running = [each.trial for each in at_work_of(desk)]
    ended = sorted(desk.history.ended(), key=lambda trial: settings.objective.sign * trial.ending.values[0])  # type: ignore[union-attr]
    for trial in (running + ended)[:ROWS]:
        values = [value_text(trial.params.get(path)) for path in paths]
        state = trial.ending.reason if trial.ending else "running"
        loss = f"{trial.seen[-1].values[0]:.4f}" if trial.seen else ""
        table.add_row(trial.name, *values, state, progress_of(trial, sweep), loss, style="" if trial.ending else "cyan")
    best = best_of(desk.history.ended(), settings)
    so_far = f"best {best.name} {best.ending.values[0]:.4f}   " if best and best.ending else ""
    done = sum(1 for _ in desk.history.ended())
    foot = f"{so_far}{done}/{settings.trials} trials" + (f"   {duration(left)} left" if left is not None else "")
    return Group(table, Text(foot, style="bold"))


def progress_of(trial: Trial, sweep: Sweep) -> str:
    """How much of its tokens a trial has had."""
    tokens = trial.seen[-1].tokens if trial.seen else 0
    return f"{tokens / sweep.settings.tokens:.0%}"


def told(trial: Trial) -> str:
    """How a trial ended, in a few words."""
    assert trial.ending is not None
    value = f"{trial.seen[-1].values[0]:.4f}" if trial.seen else "-"
    spread = f" +-{trial.seen[-1].spread:.4f}" if trial.seen and trial.seen[-1].spread else ""
    message = f" ({trial.ending.message})" if trial.ending.message else ""
    return f"{trial.ending.reason} at {count(trial.ending.tokens)} tokens: {value}{spread}{message}"


def settings_of(params: Params) -> str:
    """`optim.lr=0.001 batch.sequences=16`."""
    return " ".join(f"{path}={value_text(value)}" for path, value in params.items())


def value_text(value: object) -> str:
    """A searched value, short."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
