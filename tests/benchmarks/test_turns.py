"""Processes that take turns: while one runs the others stand still, with all their children."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.turns import Row, Training, started

COUNTS = """
import json, subprocess, sys, time
if len(sys.argv) < 3:  # the rows are a child's work, as Ray's workers' are
    sys.exit(subprocess.call([sys.executable, __file__, sys.argv[1], "child"]))
with open(sys.argv[1], "w", buffering=1) as rows:
    for step in range(100_000):
        time.sleep(0.01)
        rows.write(json.dumps([step, time.time_ns() / 1e6, 0.0]) + "\\n")
"""


def counting(folder: Path, name: str) -> Training:
    script, path = folder / "counts.py", folder / f"{name}.jsonl"
    script.write_text(COUNTS)

    def rows() -> list[Row]:
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [Row(*json.loads(line)) for line in whole.splitlines()]

    return Training([sys.executable, str(script), str(path)], rows, folder / f"{name}.log")


def test_only_one_side_gets_further(tmp_path: Path) -> None:
    sides = {name: counting(tmp_path, name) for name in ("one", "other")}
    with started(sides):
        before = {name: len(side.rows()) for name, side in sides.items()}
        turn = sides["one"].turn(0.5)
        after = {name: len(side.rows()) for name, side in sides.items()}
        assert after["one"] > before["one"]
        assert after["other"] == before["other"]
        assert turn.step_ms >= 10  # what it sleeps
        assert len(turn.intervals) <= after["one"] - before["one"]
        children = [child for side in sides.values() for child in side._tree()]
    assert not any(child.is_running() for child in children)


def test_a_training_that_ends_early_says_what_it_said(tmp_path: Path) -> None:
    broken = Training([sys.executable, "-c", "raise SystemExit('no such corpus')"], list, tmp_path / "log")
    with pytest.raises(RuntimeError, match="no such corpus"), started({"broken": broken}):
        pass
