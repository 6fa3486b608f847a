"""Which folder a command means, what --fresh passes over, and how often dying workers are started again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.experiment import Request, abandoned, settle
from orchestrator.ray_trainer import while_it_gets_further
from orchestrator.tracker import OpeningStore, Tracker
from orchestrator.tracking import Store
from trainers.claim import Claim
from trainers.config import RunConfig
from trainers.config_io import fingerprint, fingerprint_fields
from trainers.errors import ConfigError
from trainers.presets import PRESETS

TINY = PRESETS["fundamentallm/tiny"]()
CLAIM = "import sys, time; from pathlib import Path; from trainers.claim import Claim\n"
CLAIM += "claim = Claim.acquire(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"


def killed_run(run_dir: Path, mlflow_run_id: str = "") -> None:
    """The folder of a run whose driver was killed."""
    run_dir.mkdir(parents=True)
    identity = {"name": run_dir.name, "fingerprint": "0" * 64, "fields": {}, "mlflow_run_id": mlflow_run_id}
    (run_dir / "identity.json").write_text(json.dumps(identity))
    held = subprocess.Popen([sys.executable, "-c", CLAIM, str(run_dir)], stdout=subprocess.PIPE)
    assert held.stdout is not None and held.stdout.readline() == b"held\n"
    assert abandoned(run_dir) is None, "its driver lives"
    held.kill()
    held.wait()
    held.stdout.close()


def fresh(runs: Path, config: RunConfig = TINY) -> Request:
    return Request(runs_dir=runs, name="mine", fresh=True)


def test_fresh_passes_over_every_run_of_the_name(tmp_path: Path) -> None:
    assert settle(TINY, fresh(tmp_path), ()).passed_over == ()
    for name in ("mine", "mine-2"):
        (tmp_path / name).mkdir()
    experiment = settle(TINY, fresh(tmp_path), ())
    assert (experiment.name, experiment.run_dir) == ("mine-3", tmp_path / "mine-3")
    assert experiment.passed_over == (tmp_path / "mine", tmp_path / "mine-2")
    assert settle(TINY, Request(runs_dir=tmp_path, name="mine-2"), ()).passed_over == ()


def test_fresh_ends_what_a_killed_driver_left_running(tmp_path: Path, store: Store) -> None:
    """And nothing that has an ending, or a driver that lives."""
    tracked = {
        name: store.open_run("laws", name, run_id=None, tags={}, params={}) for name in ("mine", "mine-2", "mine-3")
    }
    for name, run in tracked.items():
        killed_run(tmp_path / name, run.run_id)
    (tmp_path / "mine-2" / "outcome.json").write_text('{"state": "finished", "reason": "completed"}')
    with Claim.acquire(tmp_path / "mine-3"):
        experiment = settle(TINY, fresh(tmp_path), ())
        tracker = Tracker(experiment, OpeningStore(tmp_path), print)
        experiment.run_dir.mkdir()
        (experiment.run_dir / "identity.json").write_text(
            json.dumps({"fingerprint": "0" * 64, "fields": {}, "tokenizer": "", "data": {}})
        )
        tracker.open()
        tracker.end_abandoned()
    states = {name: store.client.get_run(run.run_id).info.status for name, run in tracked.items()}
    assert states == {"mine": "KILLED", "mine-2": "RUNNING", "mine-3": "RUNNING"}
    assert store.client.get_run(tracked["mine"].run_id).data.tags["stop_reason"] == "abandoned"
    tracker.close({"state": "stopped", "reason": "test"})


def test_a_run_that_has_begun_is_settled_without_the_one_it_came_from(tmp_path: Path) -> None:
    config = TINY.model_copy(update={"init_from": str(tmp_path / "gone")})
    fields = fingerprint_fields(config, (), "a" * 64)
    identity = {"fingerprint": fingerprint(config, (), "a" * 64), "fields": fields, "init_from": config.init_from}
    (tmp_path / "child" / "checkpoints").mkdir(parents=True)
    (tmp_path / "child" / "identity.json").write_text(json.dumps(identity))
    request = Request(runs_dir=tmp_path, name="child")
    with pytest.raises(ConfigError, match="no sound checkpoint"):
        settle(config, request, ())  # it has none of its own yet
    (tmp_path / "child" / "checkpoints" / "step-00000003").mkdir()
    assert settle(config, request, ()).fingerprint == identity["fingerprint"]
    with pytest.raises(ConfigError, match="no sound checkpoint"):
        settle(config, replace(request, fresh=True), ())


# ---- starting again ------------------------------------------------------------------------------------------


class Training:
    """Fits that die, each after having saved so many steps more."""

    def __init__(self, *further: int):
        self.further = further
        self.step = 0
        self.fits: list[int] = []

    def fit(self, number: int) -> BaseException | None:
        self.fits.append(number)
        self.step += self.further[number]
        return RuntimeError(f"crash {number}") if number + 1 < len(self.further) else None


@pytest.mark.parametrize(
    ("further", "fits"),
    [((10, 10, 10, 10, 10, 10, 0), 7), ((10, 0, 10), 2), ((0, 10), 1), ((5,), 1)],
)
def test_a_fit_that_got_further_has_earned_another(further: tuple[int, ...], fits: int) -> None:
    training = Training(*further)
    error = while_it_gets_further(training.fit, lambda: training.step, over=lambda: False)
    assert training.fits == list(range(fits))
    assert (error is None) is (fits == len(further))


def test_a_run_that_is_over_is_not_begun_again() -> None:
    over: Callable[[], bool] = lambda: True  # noqa: E731
    training = Training(10, 10)
    assert while_it_gets_further(training.fit, lambda: training.step, over=over) is not None
    assert training.fits == [0]
