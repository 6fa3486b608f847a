"""What several workers share out is counted as it is: two processes on the CPU under every engine."""

from __future__ import annotations

import json

import pytest
import torch.multiprocessing as mp

from tests.trainers.contract import LARGER, ROWS, VOCABULARY, config_for
from tests.trainers.memory.slices import ENGINES, weighed
from trainers.memory.calibration import USUAL
from trainers.memory.prediction import PhaseFootprint, read_footprint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
pytest.importorskip("deepspeed")

PADDING = 0.01  # slices are of equal length


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("slices")
    mp.spawn(weighed, args=(folder,), nprocs=2)
    found: dict[str, dict[str, int]] = json.loads((folder / "slices-0.json").read_text())
    return found


def planned(kind: str) -> PhaseFootprint:
    config = config_for(kind, 2, batch={"sequences": ROWS}, model=LARGER)
    (phase,) = read_footprint(config, VOCABULARY, "cpu", USUAL["cpu"]).phases
    return phase


@pytest.mark.parametrize("kind", ENGINES)
def test_state_is_planned_as_each_engine_keeps_it(kind: str, real: dict[str, dict[str, int]]) -> None:
    phase, held = planned(kind), real[kind]
    assert phase.state.weights - phase.structure.buffer_bytes == pytest.approx(held["weights"], rel=PADDING)
    assert phase.state.optimizer == pytest.approx(held["moments"] + held["masters"], rel=PADDING)
    assert (held["masters"] > 0) == (kind in ("zero 1", "zero 2", "zero 3"))  # a stage 0 updates the weights themselves


@pytest.mark.parametrize("kind", ENGINES)
def test_an_evaluation_is_planned_with_the_weights_that_it_gathers(kind: str, real: dict[str, dict[str, int]]) -> None:
    phase = planned(kind)
    assert phase._gathered_in_evaluation == real[kind]["evaluation"]
    assert (phase._gathered_in_evaluation > 0) == (kind in ("fsdp", "zero 3"))
