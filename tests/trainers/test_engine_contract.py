"""One contract for every engine: two gloo processes on the CPU, started once for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainers import contract
from tests.trainers.contract import ENGINES, STEPS, VOCABULARY, Results, config_for, engine_for, spawn, take_step
from trainers.models import parameter_count

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

pytest.importorskip("deepspeed")
# bytes that a worker sends in a step / bytes of the weights, with 2 workers (Rajbhandari et al. 2020, section 7): all
# algorithms send (n - 1)/n of 2, or 3 where weights are gathered for the backward once more
THEORY = {"fsdp": 3, "zero 0": 2, "zero 1": 2, "zero 2": 2, "zero 3": 3, "zero 2 offload": 2, "zero 3 offload": 3}
# what a worker keeps / bytes of the fp32 weights: weights to compute with, gradients while they add up and before the
# update, moments, and weights to update beside the first ones
KEPT = {
    "ddp": (1, 1, 1, 2, 0),
    "fsdp": (1 / 2, 1, 1 / 2, 1, 0),
    "zero 0": (1, 1, 1, 2, 0),
    "zero 1": (1, 1, 1 / 2, 1, 1 / 2),
    "zero 2": (1, 1 / 2, 1 / 2, 1, 1 / 2),
    "zero 3": (1 / 2, 1 / 2, 1 / 2, 1, 1 / 2),
    "zero 1 bf16": (1 / 2, 1 / 2, 1 / 4, 1, 1 / 2),
    "zero 3 bf16": (1 / 4, 1 / 4, 1 / 4, 1, 1 / 2),
    # offloaded gradients lie once where they add up and once where the update reads them
    "zero 2 offload": (1, 1, 1, 1, 1 / 2),
    "zero 3 offload": (1 / 2, 1, 1, 1, 1 / 2),
}
PARTS = ("weights", "adding", "gradients", "moments", "masters")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contract")
    spawn(contract.two_ranks, 2, folder, list(ENGINES))
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[Results]]:
    return {kind: [torch.load(folder / f"{kind}-{rank}.pt", weights_only=False) for rank in (0, 1)] for kind in ENGINES}


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """The losses of one process."""
    torch.set_num_threads(1)
    engine = engine_for("ddp", 1)
    return [take_step(engine, step, 0, 1) for step in range(STEPS)]


def tolerance(kind: str) -> float:
    """Relative. bf16 has 8 bits of mantissa, and the losses it is compared with have fallen to a hundredth."""
    return 0.1 if "bf16" in kind else 1e-5


@pytest.mark.parametrize("kind", ENGINES)
def test_two_workers_have_the_losses_of_one(kind: str, two: dict[str, list[Results]], alone: list[float]) -> None:
    first, second = (result["trained"]["losses"] for result in two[kind])
    together = [one + other for one, other in zip(first, second, strict=True)]
    assert together == pytest.approx(alone, rel=tolerance(kind))
    assert alone[-1] < alone[0] / 2  # it learned something to agree on
    assert [2 * one for one in first] != pytest.approx(alone, rel=1e-5)  # a rank alone does not know


@pytest.mark.parametrize("kind", ENGINES)
def test_a_restart_is_invisible(kind: str, two: dict[str, list[Results]]) -> None:
    for result in two[kind]:
        assert result["continued"]["differing"] == []
        assert result["continued"]["first_forward"]


@pytest.mark.parametrize("kind", contract.SLICED)
def test_weights_of_another_type_are_a_start_and_nothing_to_go_on_with(
    kind: str, two: dict[str, list[Results]]
) -> None:
    for result in two[kind]:
        started = result["started"]
        assert started["moved"] and started["differing"] == [] and started["refused"]
        assert started["first_forward"]


@pytest.mark.parametrize("kind", contract.WITH_COPIES)
def test_without_a_fresh_working_copy_the_first_forward_differs(kind: str, two: dict[str, list[Results]]) -> None:
    assert not any(result["stale"] for result in two[kind])


@pytest.mark.parametrize("kind", ENGINES)
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_any(kind: str, two: dict[str, list[Results]]) -> None:
    for result in two[kind]:
        spoiled = result["spoiled"]
        assert spoiled["skipped"] and spoiled["changed"] == [] and spoiled["counted"] == (1, 1)
        assert spoiled["moved"]  # and the step after it does change something


@pytest.mark.parametrize("kind", ENGINES)
def test_the_whole_model_on_each_rank_is_the_one_that_is_trained(kind: str, two: dict[str, list[Results]]) -> None:
    for result in two[kind]:
        assert torch.equal(result["trained"]["whole"], result["trained"]["module"])


def test_all_engines_save_the_same_names(two: dict[str, list[Results]]) -> None:
    names = {
        kind: {name: (t.dtype, t.shape) for name, t in results[0]["trained"]["middle"].items()}
        for kind, results in two.items()
    }
    assert all(names[kind] == names["ddp"] for kind in ENGINES)


def test_any_checkpoint_of_two_workers_goes_on_with_one_in_any_engine(folder: Path, alone: list[float]) -> None:
    spawn(contract.one_rank, 1, folder, list(ENGINES))
    for source in contract.SOURCES:
        for kind in ENGINES:
            losses = torch.load(folder / f"{source} in {kind}.pt", weights_only=False)
            assert losses == pytest.approx(alone[STEPS // 2 :], rel=tolerance(kind)), f"{source} in {kind}"


@pytest.mark.parametrize("optimizer", contract.OPTIMIZERS)
def test_every_optimizer_and_a_second_phase_have_the_losses_of_one_worker(
    optimizer: str, two: dict[str, list[Results]]
) -> None:
    torch.set_num_threads(1)
    want = contract.two_phases("ddp", optimizer, 0, 1)
    for kind in contract.SLICED:
        first, second = (result["phases"][optimizer] for result in two[kind])
        assert [one + other for one, other in zip(first, second, strict=True)] == pytest.approx(want, rel=1e-5), kind


@pytest.mark.parametrize("kind", THEORY)
def test_a_step_sends_what_theory_says(kind: str, two: dict[str, list[Results]]) -> None:
    weights = 4 * parameter_count(config_for(kind, 2, model=contract.LARGER).model, VOCABULARY)
    sent = sum(result["measured"]["sent"] for result in two[kind])  # of both workers: (n - 1)/n of twice as much
    assert sent == pytest.approx(THEORY[kind] * weights, rel=0.05)


@pytest.mark.parametrize("kind", KEPT)
def test_a_worker_keeps_the_share_that_it_should(kind: str, two: dict[str, list[Results]]) -> None:
    weights = 4 * parameter_count(config_for(kind, 2, model=contract.LARGER).model, VOCABULARY)
    for result in two[kind]:
        shares = {part: result["measured"]["held"][part] / weights for part in PARTS}
        assert shares == pytest.approx(dict(zip(PARTS, KEPT[kind], strict=True)), rel=0.05)
