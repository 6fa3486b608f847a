"""Laws of the display: nothing is lost, nothing floods, no file drives the terminal, no reader is needed."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console, Group
from rich.table import Table

from orchestrator.closing_table import Closing, closing_table
from orchestrator.console import QuietConsole, duration, finite, pairs, short, size
from orchestrator.display import Display, fit, perplexity, plain

PROJECT = Path(__file__).parents[2]


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(*, terminal: bool = False, width: int = 80, total: int | None = 100) -> tuple[Display, io.StringIO, Clock]:
    screen, clock = io.StringIO(), Clock()
    console = QuietConsole(file=screen, width=width, force_terminal=terminal, highlight=False)
    return Display("header", total, terminal=terminal, console=console, clock=clock), screen, clock


def row(step: int, **more: float) -> dict[str, object]:
    base = {"train/loss": 2.5, "train/lr": 3e-4, "perf/tokens_per_s": 45_123.0, "mem/peak_gib": 0.5}
    return {"step": step, "tokens": step * 8, "time_ms": 1, "phase": "main", **base, **more}


def val(step: int, loss: float) -> dict[str, object]:
    return {
        "step": step,
        "tokens": step,
        "time_ms": 1,
        "phase": "main",
        "val/loss": loss,
        "val/perplexity": math.exp(loss),
    }


def test_plain_lines_come_at_most_every_few_seconds_but_every_evaluation_does() -> None:
    display, screen, clock = make()
    for step in range(1, 101):
        display.row(row(step))
        clock.now += 0.1
        if step % 50 == 0:
            display.row(val(step, 3.0 - step / 100))
    display.close()
    lines = screen.getvalue().splitlines()
    assert sum("val loss" in line for line in lines) == 2
    assert len(lines) <= 1 + 2 + 3
    assert lines[-1].startswith("step 100/100")


def test_the_last_row_is_shown_however_soon_the_end_comes() -> None:
    display, screen, _ = make()
    display.row(row(1))
    display.row(row(2))
    display.close()
    display.close()
    assert [line for line in screen.getvalue().splitlines() if line.startswith("step 2/100")]


def test_only_an_improvement_is_called_best() -> None:
    display, screen, _ = make()
    for step, loss in ((10, 3.0), (20, 3.2), (30, 2.9)):
        display.row(val(step, loss))
    display.close()
    assert [" best" in line for line in screen.getvalue().splitlines()[1:]] == [True, False, True]


def test_a_terminal_is_refreshed_at_most_four_times_a_second() -> None:
    display, screen, clock = make(terminal=True)
    refreshes = 0
    for step in range(1, 401):
        before = screen.tell()
        display.row(row(step))
        refreshes += screen.tell() != before
        clock.now += 0.01
    display.close()
    assert 10 <= refreshes <= 17  # 4 seconds


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_live_lines_fit_the_terminal(width: int) -> None:
    display, _, clock = make(terminal=True, width=width, total=1_000_000)
    display.row(row(900_000))
    clock.now += 10
    display.row(row(900_010, **{"val/loss": 2.0}))
    screen = io.StringIO()
    QuietConsole(file=screen, width=width, force_terminal=False, highlight=False).print(display._view())
    display.close()
    lines = screen.getvalue().splitlines()
    assert len(lines) == 2 and all(len(line) <= width for line in lines)
    assert "900,010" in lines[0] and "loss 2.5" in lines[1]


def test_the_remaining_time_follows_the_pace() -> None:
    display, _, clock = make()
    assert display.seconds_left() is None
    display.row(row(10))
    clock.now += 20
    display.row(row(20))
    assert display.seconds_left() == pytest.approx(160)
    clock.now += 60
    assert display.seconds_left() == pytest.approx(100)


def test_packing_reports_the_end_and_at_most_every_two_seconds() -> None:
    display, screen, clock = make()
    for done in range(1001):
        display.packing(done, 1000, "packing training text of main")
        clock.now += 0.01
    display.close()
    lines = screen.getvalue().splitlines()[1:]
    assert 5 <= len(lines) <= 8 and "100%" in lines[-1]


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_in_a_note_drives_the_terminal(terminal: bool) -> None:
    display, screen, _ = make(terminal=terminal)
    display.note("evil \x1b[2J\x07 [bold]markup[/bold]\nsecond line")
    display.close()
    said = screen.getvalue()
    assert "\x1b[2J" not in said and "\x07" not in said
    assert "[bold]markup[/bold]" in said and "second line" in said


def test_training_goes_on_when_the_reader_leaves() -> None:
    script = """
import sys, time
from orchestrator.display import Display
display = Display("header", 1000, terminal=False)
for step in range(1000):
    display.note(f"note {step} " + "x" * 1000)
display.close()
print("still here", file=sys.stderr)
"""
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = ["bash", "-c", f"{sys.executable} - <<'E' | head -1\n{script}\nE"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.stdout == "header\n" and done.stderr == "still here\n"


def test_under_json_progress_goes_to_standard_error() -> None:
    script = (
        "from orchestrator.display import Display;"
        "d = Display('header', 9, terminal=False, json=True); d.note('n'); d.close()"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "" and done.stderr == "header\nn\n"


# ---- the closing table -------------------------------------------------------------------------------------------

LONG = "/a/very/long/path/" + "folder/" * 20


def closing(state: str = "finished") -> Closing:
    return Closing(
        name="first-run",
        runs_dir=LONG,
        state=state,
        reason="completed" if state == "finished" else "SIGINT",
        step=100,
        tokens=51_200,
        total_steps=100 if state == "finished" else 400,
        metrics={"train/loss": 1.8, "val/loss": 1.83, "val/perplexity": math.inf},
        checkpoint=LONG + "first-run/checkpoints/step-00000100",
        plots=LONG + "plots",
        sample_text="ROMEO:\n\x1b[31mred",
        tracking_uri=f"sqlite:///{LONG}mlflow.db",
        mlflow_run_id="abc",
    )


@pytest.mark.parametrize("width", [40, 80, 120])
def test_paths_and_commands_can_be_copied_at_any_width(width: int) -> None:
    screen = io.StringIO()
    closing_table(closing(), QuietConsole(file=screen, width=width, highlight=False))
    said = screen.getvalue()
    assert LONG + "first-run/checkpoints/step-00000100" in said
    assert f"mlflow ui --backend-store-uri sqlite:///{LONG}mlflow.db" in said
    assert f"orchestrate generate first-run --runs-dir {LONG}" in said
    assert "\x1b[31m" not in said and "  | ROMEO:" in said


def test_a_stopped_run_says_how_to_go_on() -> None:
    screen = io.StringIO()
    closing_table(closing("stopped"), QuietConsole(file=screen, width=80, highlight=False))
    assert "orchestrate train first-run" in screen.getvalue()
    assert "orchestrate train first-run" not in closing().commands().values()


def test_the_closing_is_json_that_every_reader_reads() -> None:
    text = json.dumps(finite(closing().to_json()), allow_nan=False)
    assert json.loads(text)["metrics"]["val/perplexity"] is None


# ---- words for numbers -------------------------------------------------------------------------------------------


def test_words_for_numbers() -> None:
    assert [short(n) for n in (0, 950, 45_123, 3.2e6)] == ["0", "950", "45.1k", "3.2M"]
    assert [size(n) for n in (5, 1024, 5 * 2**20)] == ["5 B", "1.0 KiB", "5.0 MiB"]
    assert [duration(n) for n in (4.9, 187, 7500, 300_000)] == ["4 s", "3:07 min", "2:05 h", "3 days"]
    assert (perplexity(2.0), perplexity(1e9), perplexity(math.nan)) == ("7.389", ">1e9", "nan")
    assert fit(["aaaa", "bbbb", "cccc"], 10) == "aaaa  bbbb"
    assert plain("a\x1bb\tc") == "a b c"


@pytest.mark.parametrize("grouped", [False, True])
def test_no_number_of_a_table_is_cut(grouped: bool) -> None:
    """Where the line has no room for the columns it goes on; what may wrap or fold does not widen it."""
    screen = io.StringIO()
    console = QuietConsole(file=screen, width=30, highlight=False)
    table = Table("a long heading", "27.9 GiB (too much)", box=None)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.add_row("1,452,792,320", "16.2 GiB")
    wide = pairs([("text", "word " * 20), ("path", "/a/path" * 20)])
    console.print(Group(wide, table) if grouped else table)
    assert "27.9 GiB (too much)" in screen.getvalue() and "1,452,792,320" in screen.getvalue()
    assert console.width == 30 and max(map(len, screen.getvalue().splitlines())) <= 40
    cut = io.StringIO()
    Console(file=cut, width=30).print(table)
    assert "too much)" not in cut.getvalue()  # the negative control
