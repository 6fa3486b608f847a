"""Laws of the engine over several ranks: gloo processes on the CPU, started once for two ranks and once for three."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from trainers import engine as engine_module
from trainers.config import OptimConfig, PrecisionConfig
from trainers.data.types import IGNORED, Batch
from trainers.engine import TorchEngine
from trainers.evaluate import evaluate
from trainers.objectives.language_model import LanguageModel

VOCABULARY, WIDTH, LENGTH = 13, 16, 6
CPU = torch.device("cpu")
Results = dict[str, Any]
Engine = TypeVar("Engine", bound=TorchEngine)


class Tiny(nn.Module):
    """Embedding, a causal mean over the past, a hidden layer, a head."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.hidden = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, VOCABULARY)

    def initial_state(self, rows: int) -> None:
        return None

    def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        counts = torch.arange(1, tokens.shape[1] + 1, dtype=self.head.weight.dtype)
        past = self.embedding(tokens).cumsum(dim=1) / counts[:, None]
        return self.head(torch.tanh(self.hidden(past))), None


def tiny(dtype: torch.dtype, width: int = WIDTH) -> Tiny:
    torch.manual_seed(7)
    return Tiny(width).to(dtype)


def build(
    model: nn.Module,
    world_size: int,
    *,
    kind: type[Engine] = TorchEngine,  # type: ignore[assignment]
    **optim: Any,
) -> Engine:
    settings = OptimConfig(**{"lr": 1e-2, "weight_decay": 0.1, **optim})
    return kind(
        model,
        optim=settings,
        precision=PrecisionConfig(),
        device=CPU,
        world_size=world_size,
        compile=False,
        deterministic=False,
    )


def step_rows(step: int, rows: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one step; row r has its last r mod LENGTH targets ignored, so parts count unequally."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    targets = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    for row in range(rows):
        ignored = (row // 4 + step) % LENGTH
        if ignored:
            targets[row, -ignored:] = IGNORED
    return tokens, targets


def run_step(engine: TorchEngine, step: int, *, rank: int, ranks: int, micro: int, equal_parts: bool = False) -> float:
    """One update on this rank's share of the step in `micro` micro-batches; this rank's part of the summed loss."""
    tokens, targets = step_rows(step)
    n = int((targets != IGNORED).sum())
    share = len(tokens) // ranks
    own = slice(rank * share, (rank + 1) * share)
    parts = list(zip(tokens[own].chunk(micro), targets[own].chunk(micro), strict=True))
    summed = 0.0
    for index, (inputs, wanted) in enumerate(parts):
        batch = Batch(inputs, wanted, int((wanted != IGNORED).sum()))
        with engine.micro_batch(last=index == micro - 1) as model:
            loss = LanguageModel().loss(model, batch, None)
            divisor = batch.n_targets * micro * ranks if equal_parts else n  # the mean of means: the wrong way
            engine.backward(engine.normalise(loss.total, divisor))
        summed += loss.total.item() / n
    engine.update(1e-2)
    return summed


def weights(engine: TorchEngine) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in engine.module.parameters()]).clone()


def everything(engine: TorchEngine) -> dict[str, Tensor]:
    return {f"{file}/{name}": t.clone() for file, part in engine.tensors().items() for name, t in part.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


# ---- what the ranks run ------------------------------------------------------------------------------


class Recording(TorchEngine):
    """Keeps the gradient that every update saw, before clipping."""

    def _clip(self, gradients: list[Tensor]) -> Tensor:
        self.seen = [*getattr(self, "seen", []), torch.cat([gradient.flatten() for gradient in gradients]).clone()]
        return super()._clip(gradients)


def train_twenty(dtype: torch.dtype, rank: int, ranks: int, *, micro: int, equal_parts: bool = False) -> Results:
    engine = build(tiny(dtype), ranks, kind=Recording)
    losses = [run_step(engine, s, rank=rank, ranks=ranks, micro=micro, equal_parts=equal_parts) for s in range(20)]
    return {"weights": weights(engine), "losses": losses, "first_gradient": engine.seen[0]}


def poisoned(rank: int, ranks: int, loss: float) -> Results:
    """A good step, then one whose loss is not finite on the last rank alone, then a good one."""
    engine = build(tiny(torch.float32), ranks)
    run_step(engine, 0, rank=rank, ranks=ranks, micro=2)
    before = everything(engine)
    with engine.micro_batch(last=True) as model:
        tokens, _ = step_rows(1)
        value = model(tokens)[0].square().mean()
        # added as a constant: the gradients of this rank stay finite and only the loss tells
        engine.backward(value + (loss if rank == ranks - 1 else 0.0))
    update = engine.update(1e-2)
    unchanged = differing(before, everything(engine))
    counted = (engine.skipped.total(), engine.skipped.take_longest())
    run_step(engine, 2, rank=rank, ranks=ranks, micro=2)
    return {
        "skipped": update.skipped,
        "changed": unchanged,
        "counted": counted,
        "went_on": bool(differing(before, everything(engine))),
        "weights": weights(engine),
    }


def all_reduces(rank: int, ranks: int, *, quiet: bool) -> int:
    """Gradient exchanges of one update of four micro-batches."""
    engine = build(tiny(torch.float32), ranks)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        tokens, targets = step_rows(0, rows=8)
        for index in range(4):
            with engine.micro_batch(last=index == 3 or not quiet) as model:
                loss = LanguageModel().loss(model, Batch(tokens, targets, 48), None)
                engine.backward(engine.normalise(loss.total, 4 * 48 * ranks))
        engine.update(1e-2)
    return sum(event.count for event in recorded.key_averages() if event.key == "gloo:all_reduce")


def restarted(rank: int, ranks: int, *, width: int, optim: str) -> list[str]:
    """Tensors that differ between eight steps in one go and eight with a restart after three."""
    whole = build(tiny(torch.float32, width), ranks, name=optim)
    for step in range(3):
        run_step(whole, step, rank=rank, ranks=ranks, micro=2)
    saved, state = {k: {n: t.clone() for n, t in v.items()} for k, v in whole.tensors().items()}, whole.state()
    again = build(tiny(torch.float32, width), ranks, name=optim)
    again.load(saved, state, optimizer=True)
    for engine in (whole, again):
        for step in range(3, 8):
            run_step(engine, step, rank=rank, ranks=ranks, micro=2)
    return differing(everything(whole), everything(again))


class Text:
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, 187).astype(np.uint16)
    n_bytes = n_chars = 187


def scores(rank: int, ranks: int) -> dict[str, float]:
    return evaluate(
        tiny(torch.float32),
        Text(),
        sequence_length=LENGTH,
        rows=4,
        device=CPU,
        precision=PrecisionConfig(),
        objective=LanguageModel(),
        rank=rank,
        world_size=ranks,
    )


@contextlib.contextmanager
def group(rank: int, ranks: int, folder: Path) -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    yield
    dist.destroy_process_group()


def two_ranks(rank: int, folder: Path) -> None:
    with group(rank, 2, folder):
        results = {
            "float64": train_twenty(torch.float64, rank, 2, micro=1),
            "float64 accumulated": train_twenty(torch.float64, rank, 2, micro=4),
            "float64 mean of means": train_twenty(torch.float64, rank, 2, micro=1, equal_parts=True),
            "float32": train_twenty(torch.float32, rank, 2, micro=1),
            "nan": poisoned(rank, 2, float("nan")),
            "inf": poisoned(rank, 2, float("inf")),
            "finite": poisoned(rank, 2, 1.0),
            "all_reduces": all_reduces(rank, 2, quiet=True),
            "all_reduces loud": all_reduces(rank, 2, quiet=False),
            "restarted": {
                name: restarted(rank, 2, width=16, optim=name) for name in ("adamw", "adam", "sgd", "rmsprop")
            },
            "scores": scores(rank, 2),
        }
        torch.save(results, folder / f"{rank}.pt")


def plain_ddp(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """As torch has it, with the buckets laid out anew after the first backward."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def three_ranks(rank: int, folder: Path) -> None:
    with group(rank, 3, folder):
        settled = restarted(rank, 3, width=48, optim="adamw")
        engine_module.data_parallel = plain_ddp
        torch.save({"settled": settled, "plain": restarted(rank, 3, width=48, optim="adamw")}, folder / f"{rank}.pt")


def results_of(ranks: int, target: Callable[..., None], folder: Path) -> list[Results]:
    mp.spawn(target, args=(folder,), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return results_of(2, two_ranks, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return results_of(3, three_ranks, tmp_path_factory.mktemp("three"))


# ---- the laws ----------------------------------------------------------------------------------------


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def alone() -> dict[torch.dtype, Results]:
    return {dtype: train_twenty(dtype, 0, 1, micro=1) for dtype in (torch.float64, torch.float32)}


def test_float64_weights_after_twenty_adamw_steps_do_not_depend_on_how_rows_are_spread(
    two: list[Results], alone: dict[torch.dtype, Results]
) -> None:
    want = alone[torch.float64]["weights"]
    accumulated = train_twenty(torch.float64, 0, 1, micro=4)["weights"]
    for name, got in {
        "accumulation 4x8": accumulated,
        "2 workers": two[0]["float64"]["weights"],
        "2 workers, accumulation 4x4": two[0]["float64 accumulated"]["weights"],
    }.items():
        assert (got - want).abs().max() < 1e-10, name
    # negative control: dividing each part by its own count, the mean of means, is another gradient
    assert (two[0]["float64 mean of means"]["weights"] - want).abs().max() > 1e-4


def test_float32_first_gradient_and_twenty_losses_agree_between_one_and_two_workers(
    two: list[Results], alone: dict[torch.dtype, Results]
) -> None:
    want = alone[torch.float32]
    accumulated = train_twenty(torch.float32, 0, 1, micro=4)
    losses = [
        first + second for first, second in zip(two[0]["float32"]["losses"], two[1]["float32"]["losses"], strict=True)
    ]
    for got_gradient, got_losses in (
        (two[0]["float32"]["first_gradient"], losses),
        (accumulated["first_gradient"], accumulated["losses"]),
    ):
        assert relative(got_gradient, want["first_gradient"]) < 1e-6
        assert got_losses == pytest.approx(want["losses"], rel=1e-5)
    assert relative(two[0]["float64 mean of means"]["first_gradient"].float(), want["first_gradient"]) > 1e-3


def test_all_ranks_end_with_the_same_bits(two: list[Results]) -> None:
    assert torch.equal(two[0]["float32"]["weights"], two[1]["float32"]["weights"])
    assert torch.equal(two[0]["nan"]["weights"], two[1]["nan"]["weights"])


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_non_finite_loss_on_one_rank_leaves_every_rank_as_it_was(two: list[Results], loss: str) -> None:
    for rank in (0, 1):
        assert two[rank][loss]["skipped"] and two[rank][loss]["changed"] == []
        assert two[rank][loss]["counted"] == (1, 1)
        assert two[rank][loss]["went_on"]


def test_a_finite_loss_does_update(two: list[Results]) -> None:
    assert not two[0]["finite"]["skipped"] and two[0]["finite"]["changed"]


def test_gradients_are_exchanged_once_an_update(two: list[Results]) -> None:
    assert two[0]["all_reduces"] == 1
    assert two[0]["all_reduces loud"] == 4  # the count would show it


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "rmsprop"])
def test_a_restart_is_invisible_with_two_workers(two: list[Results], optimizer: str) -> None:
    assert two[0]["restarted"][optimizer] == two[1]["restarted"][optimizer] == []


def test_a_restart_is_invisible_with_three_workers(three: list[Results]) -> None:
    for rank in range(3):
        assert three[rank]["settled"] == []
        assert three[rank]["plain"]  # DDP as it comes lays its buckets out anew and changes the bits


def test_evaluation_has_the_same_bits_for_one_and_two_workers(two: list[Results]) -> None:
    torch.set_num_threads(1)
    assert scores(0, 1) == two[0]["scores"] == two[1]["scores"]
