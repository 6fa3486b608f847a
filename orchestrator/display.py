"""What a person sees while a run trains: a live bar on a terminal, plain lines anywhere else.

The driver calls `row` for each new metrics row, `note` for events and `tick` a few times a second. Nothing runs in
between: no thread of its own, at most four refreshes a second, so that the CPUs stay with the training.
"""

from __future__ import annotations

import contextlib
import errno
import math
import time
from collections import deque
from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator import console as terminals
from orchestrator.console import count, duration, short, size

REFRESH_S = 0.25  # on a terminal, when something is new
IDLE_REFRESH_S = 1.0  # on a terminal, to let the clock tick
LINE_S = 5.0  # between plain lines, evaluations aside
PACKING_LINE_S = 2.0  # between plain lines while a corpus is packed
SPEED_WINDOW = 64  # rows the remaining time is estimated from

Clock = Callable[[], float]


class Display:
    """Shows one run. `start_step` is where a continued run begins; `json` moves every line to standard error."""

    def __init__(
        self,
        header: str,
        total_steps: int | None,
        *,
        terminal: bool,
        json: bool = False,
        start_step: int = 0,
        console: Console | None = None,
        clock: Clock = time.monotonic,
    ):
        self.total_steps = total_steps
        self._console = console or (terminals.err() if json else terminals.out())
        self._clock = clock
        self._started = clock()
        self._activity: str | None = None
        self._activity_since = self._started
        self._fraction: tuple[float, float] | None = None  # of the activity: done, total
        self._step = start_step
        self._phase = ""
        self._values: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._pace: deque[tuple[float, int]] = deque(maxlen=SPEED_WINDOW)
        self._pending_line = ""
        self._last_line = -math.inf
        self._last_refresh = -math.inf
        self._dirty = False
        self.view: Callable[[int], RenderableType] | None = None
        """draws something else than one run's progress, for a terminal of so many columns"""
        self._live: Live | None = None
        if terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False,
                              redirect_stderr=False)  # fmt: skip
        with self._reader():
            if header:
                self._console.print(Text(header), soft_wrap=True)
            if self._live:
                self._live.start()

    # ---- what the driver says ---------------------------------------------------------------------

    def row(self, row: dict[str, object]) -> None:
        """Take in one row of metrics.jsonl."""
        step = row.get("step")
        assert isinstance(step, int)
        values = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
        phase = row.get("phase")
        self._activity = None
        self._step, self._phase = step, phase if isinstance(phase, str) else self._phase
        self._values.update(values)
        if "train/loss" in values:
            self._pace.append((self._clock(), step))
        if "val/loss" in values:
            self._evaluation(values)
        elif self._live is None:
            self._pending_line = self._plain_line()
            self._flush_line(LINE_S)
        self._dirty = True
        self.tick()

    def note(self, text: str) -> None:
        """An event worth a line of its own: a restart, a warning, a wait."""
        for line in text.splitlines():
            self._line(Text(plain(line)))

    def idle(self) -> None:
        """What `status` said is over, and nothing else has begun."""
        self._activity, self._dirty = None, True

    def status(self, text: str) -> None:
        """What is going on before, between and after the steps; replaced by the next row or status."""
        if text == self._activity:
            return
        self._activity, self._activity_since, self._fraction = text, self._clock(), None
        if self._live is None:
            self._line(Text(plain(text) + " ..."))
        self._dirty = True
        self.tick()

    def packing(self, done: int, total: int, what: str) -> None:
        """Progress of preparing the data, in bytes of text (a total of 0: not known)."""
        if self._activity is None:
            self._activity_since = self._clock()
        self._activity = what
        self._fraction = (done, total) if total else None
        if self._live is None:
            of = f" of {size(total)} ({done / total:.0%})" if total else ""
            self._pending_line = f"{plain(what)}: {size(done)}{of}"
            self._flush_line(PACKING_LINE_S if not total or done < total else 0.0)
        self._dirty = True
        self.tick()

    def tick(self) -> None:
        """Refresh the terminal where it is time; cheap enough for every turn of a polling loop."""
        if self._live is None:
            return
        now = self._clock()
        if now - self._last_refresh < (REFRESH_S if self._dirty else IDLE_REFRESH_S):
            return
        self._last_refresh, self._dirty = now, False
        with self._reader():
            self._live.update(self._view(), refresh=True)

    def close(self) -> None:
        """Take the bar away and leave the terminal as it was; may be called twice."""
        if self._live is not None:
            live, self._live = self._live, None
            with self._reader():
                live.stop()
        elif self._pending_line:
            self._flush_line(0.0)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- drawing ----------------------------------------------------------------------------------

    def _evaluation(self, values: dict[str, float]) -> None:
        """A line that stays, one for each evaluation."""
        best = self._best.get(self._phase)
        loss = values["val/loss"]
        improved = best is None or loss < best
        if improved:
            self._best[self._phase] = loss
        self._pending_line = ""
        of = f"/{count(self.total_steps)}" if self.total_steps else ""
        train = self._values.get("train/loss")
        parts = [f"step {count(self._step)}{of}", f"val loss {loss:.4f}" + (" best" if improved else "")]
        parts += [f"train {train:.4f}"] if train is not None else []
        parts += [f"ppl {values['val/perplexity']:.4g}"] if "val/perplexity" in values else []
        parts += [f"{values['val/bits_per_byte']:.3f} bits/byte"] if "val/bits_per_byte" in values else []
        self._last_line = self._clock()
        self._line(Text("  ".join(parts), style="bold" if improved else ""))

    def _plain_line(self) -> str:
        of = f"/{count(self.total_steps)}" if self.total_steps else ""
        phase = f"{self._phase}  " if self._phase not in ("", "main") else ""
        return f"{phase}step {count(self._step)}{of}  " + "  ".join(self._fields())

    def _fields(self) -> list[str]:
        """The numbers of the moment, the most important first."""
        have = self._values
        fields = []
        if "train/loss" in have:
            fields.append(f"loss {have['train/loss']:.4f}")
        if "val/loss" in have:
            fields.append(f"val {have['val/loss']:.4f}")
        if "val/loss" in have or "train/loss" in have:
            fields.append(f"ppl {perplexity(have.get('val/loss', have.get('train/loss', math.nan)))}")
        if "perf/tokens_per_s" in have:
            fields.append(f"{short(have['perf/tokens_per_s'])} tok/s")
        if "train/lr" in have:
            fields.append(f"lr {have['train/lr']:.1e}")
        if "mem/peak_gib" in have:
            fields.append(size(have["mem/peak_gib"] * 2**30))
        left = self.seconds_left()
        if left is not None:
            fields.append(f"{duration(left)} left")
        return fields

    def seconds_left(self) -> float | None:
        """Estimated from the pace of the newest rows; None before there are two."""
        if self.total_steps is None or len(self._pace) < 2:
            return None
        (then, before), (now, step) = self._pace[0], self._pace[-1]
        if step <= before or now <= then:
            return None
        return max(0.0, (now - then) / (step - before) * (self.total_steps - step) - (self._clock() - now))

    def _view(self) -> Group:
        width = self._console.width
        if self._activity is not None:
            waited = duration(self._clock() - self._activity_since)
            done, total = self._fraction or (0.0, 0.0)
            right = f"{done / total:.0%}  {waited}" if total else waited
            return Group(self._bar(plain(self._activity), (done, total), right, width))
        if self.view is not None:
            return Group(self.view(width))
        total = self.total_steps or 0
        of = f"/{count(total)}" if total else ""
        name = self._phase if self._phase not in ("", "main") else "training"
        right = f"{count(self._step)}{of}" + (f"  {self._step / total:.0%}" if total else "")
        return Group(
            self._bar(name, (self._step, total), right, width),
            Text(fit(self._fields(), width), no_wrap=True, overflow="ellipsis"),
        )

    def _bar(self, left: str, fraction: tuple[float, float], right: str, width: int) -> Table:
        done, total = fraction
        grid = Table.grid(padding=(0, 1), expand=False)
        cells: list[Text | ProgressBar] = [Text(left, style="bold", no_wrap=True, overflow="ellipsis")]
        room = width - len(left) - len(right) - 4
        if total and room >= 8:
            cells.append(ProgressBar(total=total, completed=min(done, total), width=min(room, 48)))
        cells.append(Text(right, no_wrap=True, overflow="ellipsis"))
        grid.add_row(*cells)
        return grid

    # ---- writing ----------------------------------------------------------------------------------

    def _flush_line(self, every_s: float) -> None:
        now = self._clock()
        if now - self._last_line >= every_s:
            self._last_line = now
            line, self._pending_line = self._pending_line, ""
            self._line(Text(line))

    def _line(self, text: Text) -> None:
        with self._reader():
            self._console.print(text, soft_wrap=True)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[None]:
        """Write, unless the terminal or pipe is gone: a training does not end because nobody watches it."""
        try:
            yield
        except OSError as error:  # a closed pipe, or a terminal that hung up
            if error.errno not in (None, errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET):
                raise
            self._console.quiet = True
            terminals.silence(2 if self._console.stderr else 1)


# ---- pure ---------------------------------------------------------------------------------------------


def perplexity(loss: float) -> str:
    """exp(loss) for people: '6.77', and '>1e9' instead of an overflow."""
    return f"{math.exp(loss):.4g}" if loss < 20.7 else (">1e9" if loss == loss else "nan")


def fit(fields: list[str], width: int) -> str:
    """As many fields, from the first, as stand on one line."""
    line = ""
    for field in fields:
        longer = f"{line}  {field}" if line else field
        if len(longer) > width:
            break
        line = longer
    return line


def plain(text: str) -> str:
    """Text without control characters, so that nothing from a file can drive the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
