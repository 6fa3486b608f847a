"""What the processes of test_engine_contract.py run: every engine through the same paces."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from trainers.census import gradient_sizes
from trainers.config import OptimConfig, RunConfig
from trainers.config_io import build_config
from trainers.data.types import Batch
from trainers.engines import Engine, build_engine
from trainers.errors import CheckpointError
from trainers.models import build_model
from trainers.objectives.language_model import LanguageModel
from trainers.precision import autocast

CPU = torch.device("cpu")
VOCABULARY, LENGTH, ROWS, MICRO, STEPS, LR = 29, 8, 8, 2, 40, 1e-2
MODEL = {"d_model": 32, "n_layers": 2, "n_heads": 2, "context_length": LENGTH, "dropout": 0.0}
Results = dict[str, Any]
Tensors = dict[str, Tensor]

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"parallel": "fsdp"},
    "zero 0": {"engine": "deepspeed", "deepspeed": {"zero_stage": 0}},
    "zero 1": {"engine": "deepspeed", "deepspeed": {"zero_stage": 1}},
    "zero 2": {"engine": "deepspeed", "deepspeed": {"zero_stage": 2}},
    "zero 3": {"engine": "deepspeed", "deepspeed": {"zero_stage": 3}},
    "zero 1 bf16": {"engine": "deepspeed", "deepspeed": {"zero_stage": 1}, "precision": {"compute": "bf16"}},
    "zero 3 bf16": {"engine": "deepspeed", "deepspeed": {"zero_stage": 3}, "precision": {"compute": "bf16"}},
    "zero 2 offload": {"engine": "deepspeed", "deepspeed": {"zero_stage": 2, "offload_optimizer": True}},
    "zero 3 offload": {
        "engine": "deepspeed",
        "deepspeed": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    },
}


WITH_COPIES = [kind for kind in ENGINES if kind.startswith("zero") and kind != "zero 0"]
"""whose working copies of the weights are others than those that are updated"""
SLICED = ("fsdp", "zero 1", "zero 3")
"""each its own way of cutting state into slices"""
OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop")
SOURCES = ("fsdp", "zero 3")
"""whose checkpoints are gone on with by one worker"""


def config_for(kind: str, workers: int, **changes: Any) -> RunConfig:
    settings = ENGINES[kind]
    base = {
        "device": "cpu",
        "workers": workers,
        "model": {**MODEL, "activation_checkpointing": True},
        "batch": {"sequences": ROWS, "micro_sequences": MICRO},
        "optim": {"lr": LR, "clip_norm": 0.5, "weight_decay": 0.1},
    }
    return build_config({**base, **settings, **changes})


def engine_for(kind: str, workers: int, **changes: Any) -> Engine:
    """As a run makes it; every rank draws the same weights."""
    config = config_for(kind, workers, **changes)
    torch.manual_seed(5)
    return build_engine(config, build_model(config.model, VOCABULARY), CPU, workers)


def rows_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    targets = (tokens * 7 + 3) % VOCABULARY
    targets[step % ROWS, 2:] = -100  # so that workers and micro-batches count unequally
    return tokens, targets


def take_step(engine: Engine, step: int, rank: int, ranks: int, *, lr: float = LR) -> float:
    """One update; this rank's part of the mean loss."""
    gradients(engine, step, rank, ranks, losses := [])
    engine.update(lr)
    return sum(losses)


def gradients(
    engine: Engine,
    step: int,
    rank: int,
    ranks: int,
    losses: list[float],
    *,
    factor: float = 1.0,
    held: list[int] | None = None,
) -> None:
    """Those of one step; `factor` spoils the loss of the first micro-batch. `held`: takes in what they occupy after
    each micro-batch, in bytes."""
    tokens, targets = rows_of(step)
    n, share = int((targets != -100).sum()), ROWS // ranks
    own = slice(rank * share, (rank + 1) * share)
    parts = list(zip(tokens[own].split(MICRO), targets[own].split(MICRO), strict=True))
    for index, (inputs, wanted) in enumerate(parts):
        with engine.micro_batch(last=index == len(parts) - 1) as model:
            loss = LanguageModel().loss(model, Batch(inputs, wanted, int((wanted != -100).sum())), None)
            engine.backward(engine.normalise(loss.total, n) * (factor if index == 0 else 1.0))
        losses.append(loss.total.item() / n)
        if held is not None:
            held.append(sum(gradient_sizes([*engine.gradients(), *unsharded_gradients(engine.module)]).values()))


def copied(engine: Engine) -> Tensors:
    """Every saved tensor; nothing on ranks that save none."""
    return {f"{file}/{name}": t.detach().clone() for file, part in engine.tensors().items() for name, t in part.items()}


def files_of(tensors: Tensors) -> dict[str, Tensors]:
    files: dict[str, Tensors] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        file, rest = name.split("/", 1)
        files[file][rest] = tensor
    return files


def shared(tensors: Tensors) -> Tensors:
    """Rank 0's on every rank, as a checkpoint's file would be."""
    box = [tensors]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def differing(one: Tensors, other: Tensors) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@torch.no_grad()
def forward(engine: Engine) -> Tensor:
    """The logits of a training step's forward."""
    with engine.micro_batch(last=True) as model:
        return model(rows_of(0)[0][:MICRO])[0].detach().clone()


@torch.no_grad()
def whole_forward(engine: Engine) -> Tensor:
    with engine.whole() as model, autocast(engine.precision, CPU):
        return model(rows_of(0)[0][:MICRO])[0].clone()


# ---- the paces ----------------------------------------------------------------------------------------


def trained(kind: str, rank: int, ranks: int) -> Results:
    """Forty steps, saved in the middle; and the whole model at the end."""
    engine = engine_for(kind, ranks)
    losses, middle, first = [], {}, torch.empty(0)
    for step in range(STEPS):
        if step == STEPS // 2:
            middle, first = shared(copied(engine)), forward(engine)
        losses.append(take_step(engine, step, rank, ranks))
    end = shared(copied(engine))
    result = {"losses": losses, "middle": middle, "first_forward": first, "end": end, "state": engine.state()}
    result["whole"], result["module"] = whole_forward(engine), forward(engine)
    engine.close()
    return result


def continued(kind: str, rank: int, ranks: int, saved: Results) -> Results:
    """From the middle to the end again, in a new engine."""
    engine = engine_for(kind, ranks)
    take_step(engine, 7, rank, ranks)  # so that it stands elsewhere
    engine.load(files_of(saved["middle"]), saved["state"], optimizer=True)
    first = forward(engine)
    for step in range(STEPS // 2, STEPS):
        take_step(engine, step, rank, ranks)
    end = shared(copied(engine))
    engine.close()
    return {"differing": differing(end, saved["end"]), "first_forward": torch.equal(first, saved["first_forward"])}


def started(kind: str, rank: int, ranks: int, saved: Results) -> Results:
    """From the weights alone of a run that kept them in bf16: the tensors that are not those, before and after."""
    engine = engine_for(kind, ranks)
    halves = {name: t.bfloat16() for name, t in files_of(saved["middle"])["model"].items()}
    want = {f"model/{name}": t.float() for name, t in halves.items()}
    before = {name: t for name, t in shared(copied(engine)).items() if name in want}
    engine.load({"model": halves}, {}, optimizer=False)
    after = {name: t for name, t in shared(copied(engine)).items() if name in want}
    reference = build_model(config_for(kind, ranks).model, VOCABULARY)
    reference.load_state_dict({name: t.float() for name, t in halves.items()}, strict=False)
    with torch.no_grad():
        right = torch.equal(forward(engine), reference(rows_of(0)[0][:MICRO])[0])
    refused = False
    try:
        engine.load({**files_of(saved["middle"]), "model": halves}, saved["state"], optimizer=True)
    except CheckpointError:
        refused = True
    engine.close()
    moved = differing(before, want)
    return {"moved": moved, "differing": differing(after, want), "first_forward": right, "refused": refused}


def stale(kind: str, rank: int, ranks: int, saved: Results) -> bool:
    """Whether the first forward is right where DeepSpeed's setters alone have taken over the saved weights."""
    engine = engine_for(kind, ranks)
    take_step(engine, 7, rank, ranks)
    with unrefreshed():
        engine.load(files_of(saved["middle"]), saved["state"], optimizer=True)
    right = torch.equal(forward(engine), saved["first_forward"])
    engine.close()
    return right


@contextlib.contextmanager
def unrefreshed() -> Iterator[None]:
    from deepspeed.utils import safe_set_full_fp32_param

    from trainers.deepspeed_state import ZeroState

    put = ZeroState.put_weight
    ZeroState.put_weight = lambda self, parameter, value: safe_set_full_fp32_param(parameter, value)  # type: ignore[method-assign]
    yield
    ZeroState.put_weight = put  # type: ignore[method-assign]


def spoiled(kind: str, rank: int, ranks: int) -> Results:
    """An update whose loss is NaN on the last rank alone, and one after it."""
    engine = engine_for(kind, ranks)
    take_step(engine, 0, rank, ranks)
    before = shared(copied(engine))
    gradients(engine, 1, rank, ranks, [], factor=float("nan") if rank == ranks - 1 else 1.0)
    update = engine.update(LR)
    after = shared(copied(engine))
    counted = (engine.skipped.take_longest(), engine.skipped.total())
    take_step(engine, 2, rank, ranks)
    moved = differing(after, shared(copied(engine)))
    engine.close()
    return {"skipped": bool(update.skipped), "changed": differing(before, after), "counted": counted, "moved": moved}


def two_phases(kind: str, optimizer: str, rank: int, ranks: int) -> list[float]:
    """The losses of three steps and, with other settings, of three more; sgd keeps its velocity, others begin anew."""
    lr = LR / 10 if optimizer == "rmsprop" else LR  # whose first step is 3 lr in every weight
    settings = {"name": optimizer, "lr": lr, "clip_norm": 0.5, "weight_decay": 0.1}
    engine = engine_for(kind, ranks, optim=settings)
    losses = [take_step(engine, step, rank, ranks, lr=lr) for step in range(3)]
    later = {**settings, "clip_norm": None, "weight_decay": 0.3, "betas": (0.8, 0.9)}
    engine.begin_phase(OptimConfig(**later), keep_optimizer=optimizer == "sgd")
    losses += [take_step(engine, step, rank, ranks, lr=lr) for step in range(3, 6)]
    engine.close()
    return losses


def measured(kind: str, rank: int, ranks: int, folder: Path, sent: list[float]) -> Results:
    """Bytes this rank holds and sends in a step of one micro-batch, with nothing kept because it is small."""
    changes: dict[str, Any] = {"batch": {"sequences": ROWS}, "model": LARGER}
    if kind.startswith("zero"):
        path = folder / f"ds-{rank}.json"
        # what is fetched ahead stays until the backward, and is not sent twice
        tuned = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
        path.write_text(json.dumps({"zero_optimization": tuned}))
        changes["deepspeed"] = {**ENGINES[kind]["deepspeed"], "config": str(path)}
    engine = engine_for(kind, ranks, **changes)
    for step in range(3):
        sent.clear()
        take_whole_step(engine, step, rank, ranks)
    in_a_step = sum(sent)
    held = held_bytes(engine)
    engine.close()
    engine = engine_for(kind, ranks, **{**changes, "batch": {"sequences": ROWS, "micro_sequences": MICRO}})
    take_step(engine, 0, rank, ranks)
    adding: list[int] = []
    gradients(engine, 1, rank, ranks, [], held=adding)
    held |= {"adding": adding[0], "gradients": adding[-1]}
    engine.close()
    return {"sent": in_a_step, "held": held}


LARGER = {**MODEL, "d_model": 64, "n_layers": 4}


def take_whole_step(engine: Engine, step: int, rank: int, ranks: int) -> None:
    tokens, targets = rows_of(step)
    share = ROWS // ranks
    own = slice(rank * share, (rank + 1) * share)
    with engine.micro_batch(last=True) as model:
        loss = LanguageModel().loss(model, Batch(tokens[own], targets[own], 1), None)
        engine.backward(engine.normalise(loss.total, ROWS * LENGTH))
    engine.update(LR)


def held_bytes(engine: Engine) -> dict[str, int]:
    """Of the weights at rest, of the moments, and of the weights that are updated beside them."""

    def local(tensor: Tensor) -> Tensor:
        to_local = getattr(tensor, "to_local", None)
        return tensor if to_local is None else to_local()

    weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    state = [tensor for state in engine.optimizer.state.values() for tensor in state.values() if tensor.dim()]
    return {
        "weights": sum(size(local(tensor.detach())) for tensor in weights),
        "moments": sum(size(local(tensor)) for tensor in state),
        "masters": sum(size(tensor) for tensor in engine.masters()),
    }


def unsharded_gradients(model: nn.Module) -> Iterator[Tensor]:
    """What FSDP2 adds up until it is exchanged, where torch keeps it."""
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        for group in state._fsdp_param_groups if state else ():
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                both = (parameter.unsharded_accumulated_grad, None if whole is None else whole.grad)
                yield from (gradient for gradient in both if gradient is not None)


@contextlib.contextmanager
def counted_bytes() -> Iterator[list[float]]:
    """The bytes that this rank sends in each collective, by the least that any algorithm needs."""
    sent: list[float] = []
    originals: dict[str, Any] = {}

    def wrap(name: str, cost: Callable[..., float]) -> None:
        original = originals[name] = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            sent.append(cost(dist.get_world_size(group), *args, **kwargs))
            return original(*args, **kwargs)

        setattr(dist, name, call)

    wrap("all_reduce", lambda n, tensor, *_, **__: 2 * size(tensor) * (n - 1) / n)
    wrap("reduce", lambda n, tensor, dst=None, *_, **__: size(tensor) * (dist.get_rank() != dst))
    wrap("broadcast", lambda n, tensor, src=None, *_, **__: size(tensor) * (n - 1) * (dist.get_rank() == src))
    wrap("all_gather_into_tensor", lambda n, output_tensor, input_tensor, *_, **__: size(input_tensor) * (n - 1))
    wrap("all_gather_single", lambda n, output, input, *_, **__: size(input) * (n - 1))
    wrap("reduce_scatter_single", lambda n, output, input, *_, **__: size(output) * (n - 1))
    wrap("all_gather", lambda n, tensor_list, tensor, *_, **__: size(tensor) * (n - 1))
    wrap("reduce_scatter_tensor", lambda n, output, input, *_, **__: size(output) * (n - 1))
    wrap("reduce_scatter", lambda n, output, input_list, *_, **__: size(output) * (n - 1))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---- processes ----------------------------------------------------------------------------------------


def two_ranks(rank: int, folder: Path, kinds: list[str]) -> None:
    # counted from the start: DeepSpeed keeps the functions that it finds at its first use
    with group(rank, 2, folder), counted_bytes() as sent:
        for kind in kinds:
            results: Results = {"trained": trained(kind, rank, 2)}
            results["continued"] = continued(kind, rank, 2, results["trained"])
            if kind in WITH_COPIES:
                results["stale"] = stale(kind, rank, 2, results["trained"])
            results["spoiled"] = spoiled(kind, rank, 2)
            if kind in SLICED:
                results["started"] = started(kind, rank, 2, results["trained"])
                results["phases"] = {optimizer: two_phases(kind, optimizer, rank, 2) for optimizer in OPTIMIZERS}
            results["measured"] = measured(kind, rank, 2, folder, sent)
            torch.save(results, folder / f"{kind}-{rank}.pt")


def one_rank(rank: int, folder: Path, kinds: list[str]) -> None:
    """What two ranks saved in the middle, gone on with alone by every engine."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    torch.set_num_threads(1)
    for source in SOURCES:
        saved = torch.load(folder / f"{source}-0.pt", weights_only=False)["trained"]
        for kind in kinds:
            engine = engine_for(kind, 1)
            engine.load(files_of(saved["middle"]), saved["state"], optimizer=True)
            losses = [take_step(engine, step, 0, 1) for step in range(STEPS // 2, STEPS)]
            engine.close()
            torch.save(losses, folder / f"{source} in {kind}.pt")


@contextlib.contextmanager
def group(rank: int, ranks: int, folder: Path) -> Iterator[None]:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    yield
    dist.destroy_process_group()


def spawn(target: Callable[..., None], ranks: int, folder: Path, kinds: list[str]) -> None:
    mp.spawn(target, args=(folder, kinds), nprocs=ranks)
