"""compile=true under the engines that cut a model: the same losses, in graphs that do not break off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.trainers import contract
from tests.trainers.contract import Results, copied, engine_for, forward, group, shared, spawn, take_step, whole_forward

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KINDS = ("ddp", "fsdp", "zero 2")
STEPS = 6


def two_ranks(rank: int, folder: Path, kinds: list[str]) -> None:
    with group(rank, 2, folder):
        for kind in kinds:
            result = {"eager": trained(kind, rank, compile=False), "compiled": trained(kind, rank, compile=True)}
            torch.save(result, folder / f"{kind}-{rank}.pt")
        torch.save(whole_model_in_one_graph(), folder / f"broken-{rank}.pt")


def trained(kind: str, rank: int, *, compile: bool) -> Results:
    """A few steps, what was compiled for them, and what is saved and evaluated after them."""
    torch._dynamo.reset()
    counters.clear()
    engine = engine_for(kind, 2, compile=compile)
    losses = [take_step(engine, step, rank, 2) for step in range(STEPS)]
    graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
    together = torch.allclose(whole_forward(engine), forward(engine), rtol=1e-5, atol=1e-6)
    end = shared(copied(engine))
    engine.close()
    return {"losses": losses, "graphs": graphs, "breaks": breaks, "together": together, "end": end}


def whole_model_in_one_graph() -> int:
    """The breaks of what is not done: FSDP2's hooks inside of the graph."""
    torch._dynamo.reset()
    counters.clear()
    engine = engine_for("fsdp", 2)
    with torch.no_grad():
        torch.compile(engine.module)(contract.rows_of(0)[0][:2])
    engine.close()
    return len(counters["graph_break"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("compiled")
    spawn(two_ranks, 2, folder, list(KINDS))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_compiling_changes_the_losses_by_rounding_alone(kind: str, folder: Path) -> None:
    for rank in (0, 1):
        result = torch.load(folder / f"{kind}-{rank}.pt", weights_only=False)
        eager, compiled = result["eager"], result["compiled"]
        assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-5)
        assert compiled["losses"][0] != pytest.approx(compiled["losses"][-1], rel=1e-2)  # and it trains
        assert compiled["together"] and compiled["end"].keys() == eager["end"].keys()
        assert compiled["graphs"] > 0 == eager["graphs"]
        assert compiled["breaks"] == 0 or kind == "ddp"  # whose own wrapper stays outside of the graph


def test_a_graph_of_a_whole_sharded_model_would_break(folder: Path) -> None:
    """The negative control, and the reason why FSDP2 compiles layer by layer."""
    assert torch.load(folder / "broken-0.pt", weights_only=False) > 0
