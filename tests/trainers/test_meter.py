"""Laws of the peak of memory: the same figure in whatever unit the kernel counts, and of one training alone."""

from __future__ import annotations

import resource
from itertools import count
from pathlib import Path

import pytest
import torch

from tests.trainers.small_runs import config_for, write_text
from trainers import meter
from trainers.context import LocalContext
from trainers.identity import read_json
from trainers.loop import train
from trainers.memory.resident import resident_peak, status_bytes
from trainers.record import series

CPU = torch.device("cpu")
MIB = 1 << 20
WIDE = 1 << 16  # entries of a vocabulary: each of the logits of a micro-batch takes 16 MiB


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has trained nothing yet."""
    monkeypatch.setattr(meter, "_begun", count())


def test_the_peak_is_in_bytes_on_every_system() -> None:
    assert resident_peak("linux") == status_bytes("VmHWM")
    assert resident_peak("darwin") == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resident_peak("linux") > 100 * resident_peak("darwin")


def peaks(folder: Path, name: str, **changes: object) -> list[float]:
    """MiB, as a small training records them; the last is that of outcome.json."""
    context = LocalContext(folder / name, folder / ".cache")
    train(config_for(write_text(folder), samples={"count": 0}, **changes), context)
    context.close()
    outcome = read_json(folder / name / "outcome.json") or {}
    recorded = [gib for _, gib in series(folder / name / "metrics.jsonl", "mem/peak_gib")]
    last = outcome["metrics"].get("mem/peak_gib")
    return [gib * 1024 for gib in recorded + ([] if last is None else [last])]


def large(folder: Path, name: str) -> list[float]:
    model = {"d_model": 16, "n_layers": 1, "n_heads": 2, "context_length": 32, "vocab_size": WIDE}
    return peaks(folder, name, model=model, budget={"steps": 2}, batch={"sequences": 16})


def test_what_an_earlier_training_took_does_not_count(tmp_path: Path, first: None) -> None:
    before, after = peaks(tmp_path, "before"), None
    great = large(tmp_path, "great")
    after = peaks(tmp_path, "after")
    assert max(great) > max(before) + 100
    assert max(after) < max(great) - 100 and max(after) < max(before) + 60


def test_without_forgetting_it_does_count(tmp_path: Path, first: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(meter, "forget_resident_peak", lambda: True)
    great = large(tmp_path, "great")
    assert max(peaks(tmp_path, "after")) >= max(great)


def test_where_nothing_can_be_forgotten_only_the_first_training_tells(
    tmp_path: Path, first: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "forget_resident_peak", lambda: False)
    assert len(peaks(tmp_path, "one")) > 1
    assert peaks(tmp_path, "two") == []


def test_what_an_evaluation_takes_is_seen_at_the_next_reading(first: None) -> None:
    """And not in between: looking costs more than the rest of a reading."""
    measured = meter.Meter(CPU)
    before = measured.read(1)["mem/peak_gib"]
    held = torch.ones(64 * MIB // 4)
    assert measured.read(2)["mem/peak_gib"] == before
    with measured.pause():
        del held
    assert measured.read(3)["mem/peak_gib"] > before + 0.05
