"""Laws of what is predicted of a trained trial: by its own process, when all is over, and never in its way.

In this process, without Ray.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.sweeps import foreseen as module
from orchestrator.sweeps.foreseen import FILE, TrialFootprints, foresee
from orchestrator.sweeps.memory import Footprints
from orchestrator.sweeps.point import PointJob, PointRun, Said
from tests.trainers.small_runs import config_for, write_text
from trainers.claim import Claim
from trainers.config import RunConfig
from trainers.config_io import override

ROOT = Path(__file__).parents[2]
VOCABULARY = 40
GIB = 2**30


claims: list[Claim] = []
"""of the trials in training, which their driver holds"""


@pytest.fixture(autouse=True)
def another_process() -> Iterator[None]:
    """What a process keeps between trials is not kept between tests."""
    yield
    module._footprints.cache_clear()
    let_go()


def let_go() -> None:
    while claims:
        claims.pop().release()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return override(config_for(write_text(tmp_path)), ["device=cpu"])


def job(folder: Path, config: RunConfig, vocab_size: int | None = VOCABULARY) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"),
        "run_dir": str(folder / "t0000"),
        "cache_dir": str(folder / "cache"),
        "vocab_size": vocab_size,
    }


def trained(folder: Path, config: RunConfig, peak_gib: float | None = 0.5) -> Path:
    """The folder of a trial that took so much, and was predicted."""
    run_dir = folder / "t0000"
    run_dir.mkdir(exist_ok=True)
    metrics = {} if peak_gib is None else {"mem/peak_gib": peak_gib}
    (run_dir / "outcome.json").write_text(json.dumps({"state": "finished", "metrics": metrics}))
    foresee(job(folder, config))
    return run_dir


def told(folder: Path) -> tuple[TrialFootprints, list[str]]:
    said: list[str] = []
    return TrialFootprints(VOCABULARY, folder / "cache", said.append), said


def learnt(folder: Path) -> list[int]:
    path = folder / "cache" / "memory.json"
    return [each["measured_bytes"] for each in json.loads(path.read_text())["cpu"]["samples"]] if path.exists() else []


def test_the_driver_reads_what_the_plan_says(tmp_path: Path, config: RunConfig) -> None:
    whole = Footprints(VOCABULARY, "cpu", tmp_path / "none").peak_bytes(config)
    footprints, said = told(tmp_path)
    found = footprints.of(trained(tmp_path, config), config)
    assert found == {"mem/predicted_gib": whole / GIB} and not said
    assert learnt(tmp_path) == [GIB // 2]


def test_without_a_measurement_it_is_a_prediction_all_the_same(tmp_path: Path, config: RunConfig) -> None:
    footprints, _ = told(tmp_path)
    assert footprints.of(trained(tmp_path, config, None), config) and learnt(tmp_path) == []
    compiled = config.model_copy(update={"compile": True})
    assert footprints.of(trained(tmp_path, config), compiled) and learnt(tmp_path) == []
    assert footprints.of(trained(tmp_path, config), config) and learnt(tmp_path) == [GIB // 2]  # control


def test_each_cell_teaches_once(tmp_path: Path, config: RunConfig) -> None:
    """Or a long sweep would push what was measured before out of the file."""
    footprints, _ = told(tmp_path)
    for peak in (0.5, 0.75):
        footprints.of(trained(tmp_path, config, peak), config)
    assert learnt(tmp_path) == [GIB // 2]
    wider = override(config, ["model.d_model=32"])
    footprints.of(trained(tmp_path, wider, 0.75), wider)
    assert learnt(tmp_path) == [GIB // 2, GIB * 3 // 4]


def test_a_sweep_predicts_by_what_it_began_with(tmp_path: Path, config: RunConfig) -> None:
    configs = [override(config, [f"model.d_model={width}"]) for width in (16, 32, 64, 128)]
    footprints, _ = told(tmp_path)
    first = footprints.of(trained(tmp_path, configs[0], 3.0), configs[0])
    for each in configs[1:]:
        footprints.of(trained(tmp_path, each, 3.0), each)
    run_dir = trained(tmp_path, configs[0], 3.0)
    assert footprints.of(run_dir, configs[0]) == first
    assert told(tmp_path)[0].of(run_dir, configs[0]) != first  # control: the next one has learnt


@pytest.mark.parametrize("torn", ['{"device": 5}', '{"device": "cpu", "tensor_bytes": "many"}', "[1]", "{"])
def test_a_file_that_cannot_be_used_is_a_sentence_at_most(torn: str, tmp_path: Path, config: RunConfig) -> None:
    run_dir = trained(tmp_path, config)
    (run_dir / FILE).write_text(torn)
    footprints, said = told(tmp_path)
    assert footprints.of(run_dir, config) == footprints.of(run_dir, config) == {}
    assert len(said) <= 1 and learnt(tmp_path) == []


def test_the_driver_needs_no_torch(tmp_path: Path, config: RunConfig) -> None:
    """Importing it takes seconds of the cores that the trials start on. The control predicts by itself."""
    trained(tmp_path, config)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = """
import sys
from pathlib import Path
import orchestrator.sweeps.driver
from orchestrator.sweeps.foreseen import TrialFootprints
from orchestrator.sweeps.memory import Footprints
from trainers.config import RunConfig
folder, way = Path(sys.argv[1]), sys.argv[2]
config = RunConfig.model_validate_json((folder / "config.json").read_text())
if way == "reads":
    assert TrialFootprints(40, folder / "cache", print).of(folder / "t0000", config)
else:
    assert Footprints(40, "cpu", folder / "cache").peak_bytes(config)
print("torch" in sys.modules)
"""
    answers = [
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), way], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
        for way in ("reads", "predicts")
    ]
    assert answers == [["False"], ["True"]]


# ---- in the trial's process --------------------------------------------------------------------------------------


def point(folder: Path, config: RunConfig, vocab_size: int | None = VOCABULARY, until: int | None = None) -> PointJob:
    let_go()
    claims.append(Claim.acquire(folder / "t0000"))
    more = {"generation": claims[-1].generation, "threads": 1, "tracking": {}, "workers": 1, "share": {}}
    tokens = 12 * config.tokens_per_step
    return PointJob(0, [job(folder, config, vocab_size) | more], ["val/loss"], [tokens // 2, tokens], until)


def ended(run: PointRun) -> Said:
    while not (said := run.next()).state:
        pass
    assert run.end()
    return said


def test_a_finished_trial_is_predicted(tmp_path: Path, config: RunConfig) -> None:
    assert ended(PointRun(point(tmp_path, config))).state == "finished"
    footprints, _ = told(tmp_path)
    assert footprints.of(tmp_path / "t0000", config)["mem/predicted_gib"] > 0.1
    assert len(learnt(tmp_path)) == 1 and learnt(tmp_path)[0] > 50 << 20


def test_what_did_not_finish_or_was_not_asked_is_not(tmp_path: Path, config: RunConfig) -> None:
    half = 6 * config.tokens_per_step
    assert ended(PointRun(point(tmp_path, config, until=half))).state == "stopped"
    assert not (tmp_path / "t0000" / FILE).exists()
    assert ended(PointRun(point(tmp_path, config, None))).state == "finished"
    assert not (tmp_path / "t0000" / FILE).exists()


def test_the_clock_of_the_training_stands_still(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PointRun(point(tmp_path, config))
    runs: list[bool] = []
    monkeypatch.setattr(module, "foresee", lambda job: runs.append(run._clock._since is not None))
    assert ended(run).state == "finished"
    assert runs == [False]


@pytest.mark.parametrize("broken", ["the prediction", "the file"])
def test_what_goes_wrong_does_not_stand_in_its_way(
    broken: str, tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError if broken == "the prediction" else OSError("no space left on device")

    monkeypatch.setattr(*((Footprints, "of", fail) if broken == "the prediction" else (Path, "write_text", fail)))
    run_dir = tmp_path / "t0000"
    if broken == "the file":
        run_dir.mkdir()
        foresee(job(tmp_path, config))
    else:
        assert ended(PointRun(point(tmp_path, config))).state == "finished"
    footprints, said = told(tmp_path)
    assert footprints.of(run_dir, config) == footprints.of(run_dir, config) == {}
    assert [text for text in said if "MemoryError" in text] == said and len(said) == (broken == "the prediction")
