"""Rig: what the checks of a GPU train: a small model, the same weights and batches on every device, and a text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import Figure
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.data.types import Batch
from trainers.devices import set_tf32
from trainers.engines import Engine, build_engine
from trainers.incidents import Update
from trainers.models import build_model
from trainers.objectives.language_model import LanguageModel
from trainers.presets import PRESETS
from trainers.weights import prepare_weights

FIRST_CODE, CODES = 0x3400, 0x7000  # a range of printable characters, one of them a token
STEPS, LR = 20, 2e-3  # enough for the loss to fall by far more than any band
CPU = torch.device("cpu")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Of the model and its batches."""

    d_model: int
    n_layers: int
    n_heads: int
    length: int
    """tokens in a row"""
    rows: int
    """of a step"""
    vocabulary: int


SMALL, TINY = Shape(256, 4, 4, 128, 16, 512), Shape(64, 2, 4, 32, 8, 128)


@dataclass(frozen=True)
class Rig:
    """`device` is what is checked, the CPU what it is checked against."""

    device: torch.device
    folder: Path
    """for texts, caches and runs"""
    tiny: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def shape(self) -> Shape:
        return TINY if self.tiny else SMALL

    @functools.cached_property
    def text(self) -> Path:
        """A file whose characters are the vocabulary."""
        path = self.folder / "text.txt"
        if not path.exists():
            write_text(path, 20_000 if self.tiny else 200_000, self.shape.vocabulary - 8)
        return path

    @property
    def cache(self) -> Path:
        return self.folder / ".cache"

    def config(self, *settings: str) -> RunConfig:
        """The small model in fp32 without dropout, on the device that is checked."""
        shape = self.shape
        return override(
            PRESETS["fundamentallm/small"](),
            [
                *(f"model.d_model={shape.d_model}", f"model.n_layers={shape.n_layers}"),
                *(f"model.n_heads={shape.n_heads}", f"model.context_length={shape.length}"),
                *(f"model.vocab_size={shape.vocabulary}", "model.dropout=0", f"batch.sequences={shape.rows}"),
                *(f"optim.lr={LR}", "schedule.kind=constant", "schedule.warmup_steps=0", "budget.steps=1000000"),
                *("evaluation.every_epochs=null", "evaluation.max_tokens=512", "samples.count=0"),
                *("checkpoint.every_minutes=null", "checkpoint.save_best=false", "logging.every_steps=10"),
                *(f"device={self.device.type}", f'data.sources=[{{"corpus": "{self.text}"}}]', *settings),
            ],
        )

    # ---- a model, stepped by hand -----------------------------------------------------------------------------

    def model(self, config: RunConfig, device: torch.device | None = None) -> nn.Module:
        """As a run would have it; the same weights whoever asks."""
        torch.manual_seed(5)
        model = build_model(config.model, self.shape.vocabulary)
        prepare_weights(model, config.precision)
        return model.to(device or self.device)

    def engine(self, config: RunConfig, device: torch.device | None = None, world_size: int = 1) -> Engine:
        """As a run would build it, around `model`."""
        device = device or self.device
        if device.type == "cuda":
            set_tf32(config.precision.tf32)
        return build_engine(config, self.model(config, device), device, world_size)

    def batch(self, step: int, device: torch.device | None = None) -> Batch:
        """The rows of a step: a token decides the next one, so there is something to learn."""
        shape = self.shape
        generator = torch.Generator().manual_seed(100 + step)
        tokens = torch.randint(0, shape.vocabulary, (shape.rows, shape.length), generator=generator)
        targets = (tokens * 7 + 3) % shape.vocabulary
        device = device or self.device
        return Batch(tokens.to(device), targets.to(device), tokens.numel())

    def losses(self, config: RunConfig, steps: int = STEPS, *, device: torch.device | None = None) -> list[float]:
        """Of each step, a mean over its targets."""
        engine = self.engine(config, device)
        taken = [take_step(engine, self.batch(step, device))[0] for step in range(steps)]
        engine.close()
        return [float(loss) for loss in taken]

    @functools.cached_property
    def reference(self) -> list[float]:
        """The losses in fp32 on the CPU."""
        return self.losses(self.config("device=cpu"), device=CPU)

    @functools.cached_property
    def plain(self) -> list[float]:
        """The losses in fp32 on the device."""
        return self.losses(self.config())


def take_step(
    engine: Engine, batch: Batch, *, micro: int | None = None, factor: float = 1.0, ranks: int = 1
) -> tuple[Tensor, Update]:
    """One update on `batch`, in micro-batches of `micro` rows; this rank's part of its mean loss, and the update.

    `factor` spoils the loss. Nothing here waits for the device.
    """
    targets = batch.n_targets * ranks
    total = gradients(engine, batch, targets, micro=micro, factor=factor)
    return total / targets, engine.update(LR)


def gradients(engine: Engine, batch: Batch, targets: int, *, micro: int | None = None, factor: float = 1.0) -> Tensor:
    """Add up the gradients of a step of so many targets; the summed loss of `batch`."""
    pieces = split(batch, micro or len(batch.tokens))
    total: Tensor | None = None
    for index, piece in enumerate(pieces):
        with engine.micro_batch(last=index == len(pieces) - 1) as model:
            loss = LanguageModel().loss(model, piece, None).total
            engine.backward(engine.normalise(loss, targets) * factor)
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def split(batch: Batch, rows: int) -> list[Batch]:
    """Micro-batches of so many rows."""
    pieces = zip(batch.tokens.split(rows), batch.targets.split(rows), strict=True)
    return [replace(batch, tokens=tokens, targets=targets, n_targets=tokens.numel()) for tokens, targets in pieces]


def copied(engine: Engine) -> Tensors:
    """Every saved tensor."""
    files = engine.tensors().items()
    return {f"{file}/{name}": tensor.detach().clone() for file, part in files for name, tensor in part.items()}


def differing(one: Tensors, other: Tensors) -> int:
    """How many tensors differ in any bit."""
    assert one.keys() == other.keys()
    return sum(not torch.equal(one[name], other[name]) for name in one)


def apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of two rows of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative, in the 2-norm; computed in float64 on the CPU."""
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def within(what: str, value: float, bar: float) -> Figure:
    return Figure(what, value, "", bar=bar)


def at_least(what: str, value: float, bar: float) -> Figure:
    return Figure(what, value, "", bar=bar, at_least=True)


def write_text(path: Path, n_tokens: int, codes: int) -> None:
    """Text whose characters are as unevenly frequent as words are (Zipf) and follow each other with some regularity."""
    rng = np.random.default_rng(0)
    shares = 1.0 / np.arange(1, codes + 1)
    drawn = rng.choice(codes, n_tokens, p=shares / shares.sum())
    drawn[1::2] = (drawn[0::2][: len(drawn[1::2])] * 7 + 3) % codes  # every second one follows from the first
    path.write_text((drawn + FIRST_CODE).astype("<u4").tobytes().decode("utf-32-le"), encoding="utf-8")
