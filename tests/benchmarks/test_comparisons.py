"""What the published numbers rest on: both sides compute the same, and the order of the clock favours neither."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.measure import Figure, Ratio, ratio, rounds
from benchmarks.tables import BEGIN, PAGES, table, with_tables
from benchmarks.workload import QUIET, BareJob, our_loop
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.presets import PRESETS

STEPS = 20


def tiny(*settings: str) -> RunConfig:
    quiet = [*QUIET, "evaluation.every_steps=null", "checkpoint.every_steps=null", f"budget.steps={STEPS + 1}"]
    return override(PRESETS["fundamentallm/tiny"](), [*quiet, *settings])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_our_loop_computes_what_a_bare_one_computes(tmp_path: Path, dropout: float) -> None:
    with our_loop(tiny(f"model.dropout={dropout}"), tmp_path) as ours:
        bare = BareJob.of(ours, STEPS).loop(ours.run.model)
        for _ in range(STEPS // 5):  # the loop may stop and go on between any two steps
            ours.steps(5)
            for _ in range(5):
                bare.step()
        logged = [np.float32(value) for _, value in ours.logged("train/loss")]
        assert logged == [np.float32(value) for value in bare.losses]
        weights = zip(ours.run.model.parameters(), bare.model.parameters(), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in weights)


def test_a_single_other_row_shows(tmp_path: Path) -> None:
    with our_loop(tiny("model.dropout=0"), tmp_path) as ours:
        job = BareJob.of(ours, STEPS)
        job.order[3, 0] += 1
        bare = job.loop(ours.run.model)
        ours.steps(10)
        for _ in range(10):
            bare.step()
        ((_, logged),) = ours.logged("train/loss")
        assert np.float32(logged) != np.float32(bare.losses[0])


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    with our_loop(tiny(), tmp_path) as ours:
        job = BareJob.of(ours, STEPS)
    job.save(tmp_path / "job")
    again = BareJob.load(tmp_path / "job")
    assert np.array_equal(again.order, job.order)
    here, there = job.loop(), again.loop()
    for _ in range(10):
        here.step()
        there.step()
    assert here.losses == there.losses


def test_rounds_turn_the_order_so_that_drift_falls_on_both() -> None:
    clock = iter(range(100))
    times = rounds({"a": lambda: next(clock), "b": lambda: next(clock)}, 4)
    assert times == {"a": [0, 3, 4, 7], "b": [1, 2, 5, 6]}
    assert sum(times["a"]) == sum(times["b"])


def test_a_ratio_covers_what_it_was_made_from() -> None:
    rng = np.random.default_rng(1)
    theirs = rng.uniform(1, 2, 200)
    found = ratio(list(theirs * rng.normal(1.05, 0.01, 200)), list(theirs))
    assert found.low < 1.05 < found.high
    assert found.high - found.low < 0.01


def test_a_missed_bar_says_so_and_a_noisy_machine_gives_none() -> None:
    found = Ratio(1.5, 1.4, 1.6, 30)
    assert Figure.of("x", found, bar=2.0).verdict == "met"
    assert Figure.of("x", found, bar=1.02).verdict == "MISSED"
    assert Figure.of("x", found, bar=1.02, noise="two alike loops differ by +3.0%").verdict.startswith("no verdict")


def test_a_table_has_its_machine_and_every_figure() -> None:
    machine = {"date": "2026-01-01", "gpu": None, "cpu": "C", "cores": 2, "threads": 2, "torch": "2", "steal": 0.01}
    figure = {
        "what": "w",
        "value": 1.5,
        "unit": "x",
        "low": 1.0,
        "high": 2.0,
        "bar": 2.0,
        "at_least": False,
        "noise": None,
    }
    text = table("name", {"machine": machine, "figures": [figure]})
    assert "2026-01-01, C, 2 cores" in text
    assert "| w | 1.5 (1 to 2) x | ≤ 2 | met |" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_shows_what_was_measured(page: Path) -> None:
    """`python -m benchmarks report` leaves every page as it stands."""
    text = page.read_text(encoding="utf-8")
    assert BEGIN in text and with_tables(text, PAGES[page]) == text
    assert with_tables(text.replace(BEGIN, f"{BEGIN}\n| a figure by hand |"), PAGES[page]) == text
