"""What runs inside the processes that tests/trainers/crash.py starts."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import trainers.loop
import trainers.run
from trainers.config import ModelConfig, RunConfig
from trainers.context import LocalContext
from trainers.engine import TorchEngine
from trainers.errors import TrainingFailed
from trainers.filesystem import Filesystem
from trainers.incidents import Update


def play(config: dict[str, Any], run_dir: str, plan: Any, rank: int, workers: int, meeting_place: str) -> None:
    """Train under `plan` as one rank; ends the process with 0, with 3 where training failed, or by SIGKILL."""
    trainers.run.Run.__init__ = _remember  # type: ignore[method-assign]  # here, not where this is only imported
    torch.set_num_threads(1)
    stack = Path(meeting_place, f"stack-{rank}.txt").open("w")  # noqa: SIM115 (open for the life of the process)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    join(rank, workers, meeting_place)
    if rank == plan.rank:
        sabotage(plan.sabotage)
        if plan.kill_in_save is not None:
            kill_writer(plan.kill_in_save)
    leave_out(plan.left_out)
    build = NoisyMemory if plan.build == "noisy_memory" else trainers.loop.build_model
    if rank == workers - 1:
        build = poisoned(build, plan.poison)
    ctx = Scripted(Path(run_dir), plan)
    try:
        trainers.loop.train(RunConfig.model_validate(config), ctx, build=build)
    except TrainingFailed as failure:
        (ctx.run_dir / f"failure-{rank}.txt").write_text(str(failure))
        sys.exit(3)
    finally:
        ctx.close()


def join(rank: int, workers: int, meeting_place: str) -> None:
    """Become one rank of several, as under torchrun; `meeting_place` is an empty folder of this attempt's own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    if workers > 1:
        store = f"file://{meeting_place}/rendezvous"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)


class Scripted(LocalContext):
    """A context that stops or kills its process when the loop asks whether to stop before a chosen update."""

    def __init__(self, run_dir: Path, plan: Any):
        super().__init__(run_dir)
        self.plan = plan

    def should_stop(self) -> str | None:
        if self.rank != self.plan.rank:
            return None
        step = current_step()
        if step == self.plan.kill_at:
            if self.plan.rows_arrived and RUNS[-1].record is not None:
                RUNS[-1].record.sync()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.plan.stop_reason if step == self.plan.stop_at else None


def current_step() -> int:
    """The step of the run in this process."""
    assert RUNS, "no run has started"
    return RUNS[-1].progress.step


RUNS: list[trainers.run.Run] = []
_init = trainers.run.Run.__init__


def _remember(self: trainers.run.Run, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    RUNS.append(self)


def poisoned(build: trainers.loop.Builder, steps: tuple[int, ...]) -> trainers.loop.Builder:
    """A builder whose models give NaN for the first row of each micro-batch in the updates after `steps`."""

    def spoil(model: nn.Module, inputs: Any, output: Any) -> Any:
        if not model.training or current_step() not in steps:
            return output
        logits, state = output
        spoiled = logits.clone()
        spoiled[0] *= float("nan")
        return spoiled, state

    def built(config: ModelConfig, vocab_size: int) -> nn.Module:
        model = build(config, vocab_size)
        model.register_forward_hook(spoil)
        return model

    return built


def leave_out(steps: tuple[int, ...]) -> None:
    """Let the engine drop the gradients of the updates after `steps`, and know of no incident."""
    update = TorchEngine.update

    def update_or_not(self: TorchEngine, lr: float) -> Update:
        if current_step() not in steps:
            return update(self, lr)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(torch.tensor(0.0), False)

    TorchEngine.update = update_or_not  # type: ignore[method-assign]


def kill_writer(operation: int) -> None:
    """SIGKILL at the n-th operation that changes the disk."""
    count = 0

    def counted(name: str) -> Any:
        original = getattr(Filesystem, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in ("write", "fsync", "rename", "mkdir", "fsync_dir"):
        setattr(Filesystem, name, counted(name))


def sabotage(piece: str | None) -> None:
    """Withhold one piece of state from every restore."""
    run = trainers.run
    if piece == "rng":
        run.restore_rng = lambda tensors: None
    elif piece == "moments":
        load = TorchEngine.load
        TorchEngine.load = lambda self, files, state, *, optimizer: load(self, files, state, optimizer=False)  # type: ignore[method-assign]
    elif piece == "cursor":
        from trainers.data.loader import RowLoader

        fetch = RowLoader.micro_batches
        RowLoader.micro_batches = lambda self, step: fetch(self, max(0, step - 1))  # type: ignore[method-assign]
    elif piece == "stream_position":
        from trainers.data.loader import RowLoader

        RowLoader.restore = lambda self, state: None  # type: ignore[method-assign]
        fetch = RowLoader.micro_batches
        RowLoader.micro_batches = lambda self, step: fetch(self, step - 4)  # type: ignore[method-assign]
    elif piece == "stream_state":
        run.Streams.load = lambda self, tensors: self.begin()
    elif piece == "patience":
        from_json = run.Progress.from_json
        run.Progress.from_json = staticmethod(  # type: ignore[method-assign]
            lambda data: from_json({**data, "best": None, "reference": None, "evaluations_without_improvement": 0})
        )
    else:
        assert piece is None, piece


class NoisyMemory(nn.Module):
    """A small model with runtime state per stream and noise of its own from numpy's global generator.

    h_t = tanh(E x_t + 0.9 h_{t-1}); logits = W (h_t + noise).
    """

    width = 8

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, self.width)
        self.head = nn.Linear(self.width, vocab_size)

    def initial_state(self, rows: int) -> dict[str, torch.Tensor]:
        return {"memory": torch.zeros(rows, self.width)}

    def forward(self, tokens: torch.Tensor, state: dict[str, torch.Tensor] | None = None) -> Any:
        memory = (state or self.initial_state(len(tokens)))["memory"]
        outputs = []
        for inputs in self.embed(tokens).unbind(1):
            memory = torch.tanh(inputs + 0.9 * memory)
            outputs.append(memory)
        hidden = torch.stack(outputs, 1)
        if self.training:
            hidden = hidden + torch.from_numpy(np.random.normal(0, 0.01, hidden.shape)).to(hidden.dtype)
        return self.head(hidden), {"memory": memory}
