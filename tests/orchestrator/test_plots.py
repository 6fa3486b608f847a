"""Laws of the pictures: they come from the record alone, show what it says, and can be drawn of anything."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orchestrator.curves import Curves, Series, read_curves, smoothed, thinned
from orchestrator.plots import plot_curves, wrapped
from orchestrator.samples import Sample, render_samples, to_markdown

ROOT = Path(__file__).parents[2]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(step: int, phase: str = "main", **metrics: object) -> dict:
    return {"step": step, "tokens": 64 * step, "time_ms": step, "phase": phase} | {
        name.replace("__", "/"): value for name, value in metrics.items()
    }


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def series(values: list[float] | np.ndarray) -> Series:
    return Series(np.arange(len(values)), np.asarray(values, dtype=float))


RECORDS = {
    "one row": [row(1, train__loss=4.2, train__lr=0.0)],
    "only an evaluation": [row(1, val__loss=4.2, val__perplexity=66.0, val__bits_per_byte=6.1)],
    "equal values": [row(s, train__loss=1.0, train__grad_norm=0.0, perf__tokens_per_s=0.0) for s in range(1, 40)],
    "nothing finite but one": [row(1, train__loss="nan", train__grad_norm="inf"), row(2, train__loss=3.0)],
    "two phases with incidents": [
        row(s, "prose" if s < 40 else "a very long name of $1", train__loss=5 / s, incidents__nonfinite=s // 30)
        for s in range(1, 80)
    ],
    "a spike": [row(s, train__loss=1e9 if s == 50 else 5 - s / 50, train__grad_norm=10.0**s) for s in range(1, 200)],
}


@pytest.mark.parametrize("name", RECORDS)
def test_any_record_with_a_number_can_be_drawn(name: str, tmp_path: Path) -> None:
    record = write(tmp_path / "metrics.jsonl", RECORDS[name])
    assert plot_curves(record, tmp_path / "plots" / "curves.png", "a run of $100_000 and {braces}")
    assert png_size(tmp_path / "plots" / "curves.png") == (1800, 1008)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["curves.png"]


def test_a_record_without_numbers_makes_no_picture(tmp_path: Path) -> None:
    assert not plot_curves(tmp_path / "absent.jsonl", tmp_path / "curves.png", "run")
    assert not plot_curves(write(tmp_path / "m.jsonl", [row(1, train__loss="nan")]), tmp_path / "curves.png", "run")
    assert not (tmp_path / "curves.png").exists()


def test_the_record_is_read_first_write_wins_with_its_phases_and_incidents(tmp_path: Path) -> None:
    rows = [
        row(2, "prose", train__loss=2.0),
        row(4, "prose", train__loss=1.0, incidents__nonfinite=1),
        row(4, "prose", train__loss=9.0, val__loss=1.5),
        row(6, "code", train__loss="inf", incidents__nonfinite=1),
        row(8, "code", train__loss=0.5, incidents__nonfinite=3, resume__diverged=2),
    ]
    record = write(tmp_path / "metrics.jsonl", rows)
    with record.open("a") as handle:
        handle.write('{"step": 9, "train/lo')  # torn by a crash
    curves = read_curves(record)
    assert curves.series["train/loss"].values.tolist() == [2.0, 1.0, math.inf, 0.5]
    assert curves.get("train/loss").steps.tolist() == [2, 4, 8]
    assert curves.phases == (("prose", 2, 4), ("code", 6, 8))
    assert curves.incidents == ((4, "non-finite"), (8, "diverged"), (8, "non-finite"))  # a total marks only its rises
    assert len(curves.get("never/logged")) == 0


def test_thinning_keeps_every_extreme() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    values[[777, 31_234]] = [50.0, -50.0]
    drawn = thinned(series(values), 2000)
    assert len(drawn) <= 2002 and {50.0, -50.0} <= set(drawn.values)
    assert drawn.steps[0] == 0 and drawn.steps[-1] == 49_999 and (np.diff(drawn.steps) > 0).all()
    assert not {50.0, -50.0} & set(values[::25])  # the control: taking every 25th loses them


def test_smoothing_changes_no_constant_crosses_no_phase_and_ignores_a_lone_spike() -> None:
    one_phase = Curves({}, (("main", 0, 99),), ())
    spiked = np.full(100, 3.0)
    spiked[50] = 1000.0
    assert smoothed(series(spiked), one_phase).values.tolist() == [3.0] * 100
    step = np.repeat([5.0, 1.0], 50)
    two_phases = Curves({}, (("a", 0, 49), ("b", 50, 99)), ())
    assert smoothed(series(step), two_phases).values.tolist() == step.tolist()
    assert smoothed(series(step), one_phase).values.tolist() != step.tolist()


def test_wrapping_loses_no_character_and_keeps_its_colour() -> None:
    block = [("To be, or not to be:\n", "grey"), ("that is the question " * 9 + "x" * 50, "blue")]
    lines = wrapped(block, 40)
    text = "".join(part for line in lines for part, _ in line)
    assert text == "".join(part for part, _ in block).replace("\n", "⏎")
    assert all(sum(len(part) for part, _ in line) <= 40 for line in lines)
    assert "".join(part for line in lines for part, colour in line if colour == "grey") == "To be, or not to be:⏎"


def test_samples_become_markdown_and_one_picture(tmp_path: Path) -> None:
    sample = {"prompt": "a ``` fence, $x$ and\n", "generated": "日本 \x00 \\frac{", "truth": "```\n````"}
    for step in (100, 200):
        (tmp_path / f"step-{step:08d}.json").write_text(json.dumps([sample]))
    assert render_samples(tmp_path) == tmp_path / "last.png"
    assert png_size(tmp_path / "last.png")[0] > 1000
    markdown = (tmp_path / "step-00000100.md").read_text()
    assert "`````text\n```\n````\n`````" in markdown and "step 100" in markdown
    assert render_samples(tmp_path / "empty") is None


def test_every_part_of_a_sample_stands_in_the_markdown() -> None:
    text = to_markdown(3, [Sample("prompt one", "written", "true"), Sample("prompt two", "", "")])
    assert all(part in text for part in ("prompt one", "written", "true", "prompt two"))


def test_the_module_loads_no_matplotlib_and_drawing_no_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrator.plots import plot_curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        "assert plot_curves(Path(sys.argv[1]), Path(sys.argv[2]), 'run')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    record = write(tmp_path / "m.jsonl", RECORDS["one row"])
    command = [sys.executable, "-W", "error", "-c", code, str(record), str(tmp_path / "c.png")]
    subprocess.run(command, cwd=ROOT, check=True)
