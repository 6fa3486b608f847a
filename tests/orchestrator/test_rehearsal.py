"""Laws of `tune --dry-run`: it counts, bounds and refuses as the sweep itself would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli import BAD_INPUT, DONE, main
from orchestrator.sweeps import rehearsal, slots
from orchestrator.sweeps.rehearsal import bounds_of, expected_tokens, slots_there, whole_of, within_memory
from orchestrator.sweeps.settings import SweepSettings, build_settings
from orchestrator.sweeps.slots import slots_of
from orchestrator.sweeps.sweep import Sweep, SweepRequest
from search_spaces.space import Axis, Choice, Float, Space
from trainers.config_io import build_config, override
from trainers.errors import UserError

SPACE = Space((Axis("optim.lr", Float(1e-4, 1e-1, log=True)),))
BASE = build_config(
    {
        "preset": "fundamentallm/tiny",
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "context_length": 32},
        "batch": {"sequences": 6},
        "budget": {"tokens": 60 * 6 * 32},
    }
)
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 200
GIB = 1 << 30


def settings(**changes: Any) -> SweepSettings:
    return build_settings({"trials": 4, **changes}, SPACE.to_json(), tokens=900)


def sweep_of(workers: int = 1, *, device: Any = "cpu", **changes: Any) -> Sweep:
    base = override(BASE, [f"workers={workers}"])
    return Sweep("", Path("runs"), Path("runs"), base, settings(**changes), SPACE, {}, (), device)


def cluster(cpus: float, gpus: float = 0) -> Any:
    total = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    return SimpleNamespace(
        cluster_resources=lambda: total,
        nodes=lambda: [{"NodeID": "one", "Alive": True, "Resources": total}],
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "one"),
    )


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ORCHESTRATE_RUNS", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def this_machine_has(cpus: int, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(rehearsal, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


# ---- how many at a time ----------------------------------------------------------------------------------------------

PLACES: list[tuple[int, int, dict[str, Any], dict[str, Any]]] = [
    (8, 0, {}, {}),
    (8, 0, {"cpus_per_trial": 3}, {}),
    (8, 0, {"workers": 2}, {}),
    (8, 0, {}, {"concurrent": 3}),
    (16, 2, {"device": "cuda"}, {}),
    (16, 2, {"device": "cuda"}, {"gpus_per_trial": 0.25}),
    (1, 0, {"workers": 2}, {}),  # a Ray of this machine has a CPU for each worker
]


@pytest.mark.parametrize(("cpus", "gpus", "changes", "asked"), PLACES)
def test_trials_at_a_time_are_those_of_the_sweep(
    cpus: int, gpus: int, changes: dict[str, Any], asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine, and on the cluster that RAY_ADDRESS names whatever this machine has."""
    sweep, request = sweep_of(**changes), SweepRequest(Path("runs"), **asked)
    there = cluster(max(cpus, sweep.base.workers), gpus)
    this_machine_has(cpus, gpus, monkeypatch)
    here = slots_there(sweep, request)
    assert here == slots_of(there, sweep, request)

    @contextmanager
    def joined(workers: int, **_: Any) -> Iterator[Any]:
        yield there

    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    monkeypatch.setattr(slots, "ray_cluster", joined)
    this_machine_has(100, 100, monkeypatch)
    assert slots_there(sweep, request) == here
    monkeypatch.delenv("RAY_ADDRESS")
    assert slots_there(sweep, request) != here or asked.get("concurrent")  # the control: this machine has more


@pytest.mark.parametrize(
    ("changes", "asked", "way_out"),
    [
        ({"device": "cuda"}, {"gpus_per_trial": 3.0}, "--gpus-per-trial"),
        ({}, {"gpus_per_trial": 3.0}, "--gpus-per-trial"),
        ({"device": "cuda", "workers": 2}, {}, "needs 2 GPUs"),
        ({"cpus_per_trial": 64}, {}, "--cpus-per-trial"),
    ],
)
def test_a_trial_that_can_never_be_placed_is_refused(
    changes: dict[str, Any], asked: dict[str, Any], way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    this_machine_has(8, 1, monkeypatch)
    with pytest.raises(UserError, match=way_out):
        slots_there(sweep_of(**changes), SweepRequest(Path("runs"), **asked))
    assert slots_there(sweep_of(device="cuda"), SweepRequest(Path("runs"), gpus_per_trial=1.0)).count == 1


def test_a_cluster_that_does_not_answer_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: Any, **__: Any) -> Any:
        raise ConnectionError("nobody there\nand more")

    monkeypatch.setenv("RAY_ADDRESS", "nowhere:6379")
    monkeypatch.setattr(slots, "ray_cluster", nobody)
    with pytest.raises(UserError, match=r"cannot be asked what it has: nobody there$"):
        slots_there(sweep_of(), SweepRequest(Path("runs")))


# ---- how much --------------------------------------------------------------------------------------------------------

AMOUNTS = st.none() | st.floats(0.01, 1e5)


@given(
    tokens=st.none() | st.integers(1, 10_000), seconds=AMOUNTS, hours=AMOUNTS, gpus=st.sampled_from([0.0, 0.5, 4.0]),
    speed=st.none() | st.floats(0.1, 1e4), scheduler=st.sampled_from(["none", "asha"]),
)  # fmt: skip
def test_no_total_passes_a_budget(
    tokens: int | None, seconds: float | None, hours: float | None, gpus: float, speed: float | None, scheduler: str
) -> None:
    asked = settings(scheduler=scheduler)
    request = SweepRequest(Path("runs"), max_tokens=tokens, max_seconds=seconds, max_gpu_hours=hours)
    found = bounds_of(asked, request, gpus, speed)
    assert found.tokens_expected <= found.tokens_at_most <= whole_of(asked) == 4 * 900
    assert tokens is None or found.tokens_at_most <= tokens
    times = [limit for limit in (seconds, hours * 3600 / gpus if hours and gpus else None) if limit is not None]
    for limit in times:
        assert found.seconds_at_most is not None and found.seconds_at_most <= limit * (1 + 1e-12)
    if speed is not None:
        assert found.seconds_at_most == found.tokens_at_most / speed
        assert found.seconds_expected == found.tokens_expected / speed
    assert (found.by is not None) == (found.tokens_at_most < whole_of(asked))


def test_without_budgets_it_is_the_whole_sweep() -> None:
    """The control of the above."""
    found = bounds_of(settings(), SweepRequest(Path("runs")), 0.0, 10.0)
    assert (found.tokens_at_most, found.tokens_expected, found.by) == (3600, expected_tokens(settings()), None)
    assert bounds_of(settings(), SweepRequest(Path("runs")), 1.0, None).seconds_at_most is None


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_cluster_whose_memory_nobody_knows_keeps_every_cell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unless it was said what a worker there may take: that is a prediction, and needs no hardware."""
    space = Space((Axis("model.d_model", Choice((16, 4096))),))
    unsaid, said = SweepRequest(tmp_path), SweepRequest(tmp_path, memory_limit=GIB)
    monkeypatch.setattr(rehearsal, "limit_for", lambda *_, **__: SimpleNamespace(bytes=GIB))
    here = within_memory(BASE, space, 100, "cpu", 1, unsaid)
    assert [cell for cell, _ in here.taken_out] == ["model.d_model=4096"]
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    assert within_memory(BASE, space, 100, "cpu", 1, unsaid).taken_out == ()
    assert within_memory(BASE, space, 100, "cpu", 1, said) == here


# ---- through the command line ----------------------------------------------------------------------------------------


def test_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    this_machine_has(2, 0, monkeypatch)
    Path("text.txt").write_text(TEXT)
    tune = ["tune", "fundamentallm/tiny", "--data", "text.txt", "--runs-dir", "runs", "--dry-run", "budget.steps=5"]
    grid = [
        "--set-space",
        "optim.lr=log(1e-4,1e-2)",
        "--set-space",
        "model.dropout=[0.0,0.1,0.2]",
        "--searcher",
        "grid",
    ]

    def facts(*more: str) -> dict[str, Any]:
        assert main([*tune, *grid, *more, "--json"]) == DONE
        return json.loads(capsys.readouterr().out)

    whole, capped = facts(), facts("--max-tokens", "1000", "--trials", "4")
    assert (whole["trials"], whole["trials_at_a_time"], whole["bounded_by"], whole["notes"]) == (9, 2, None, [])
    assert capped["tokens_at_most"] == 1000 and capped["bounded_by"] == "--max-tokens"
    assert "the grid has 9 cells, and --trials 4 takes the first 4 in order" in capped["notes"][0]
    beyond = facts("--trials", "20")
    assert (beyond["trials"], beyond["tokens_at_most"]) == (9, whole["tokens_at_most"])
    assert beyond["notes"] == ["the grid has 9 cells: of --trials 20, no more are trained"]
    assert main([*tune, *grid, "--max-time", "1s", "--trials", "4"]) == DONE
    assert "the grid has 9 cells" in " ".join(capsys.readouterr().out.split())
    assert main([*tune, *grid, "--gpus-per-trial", "3"]) == BAD_INPUT
    assert "a trial needs 3 GPUs and the cluster has 0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
