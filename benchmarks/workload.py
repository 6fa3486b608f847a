"""What is trained in the benchmarks, on our side and on the bare one, from the same data, weights and rates."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.bare_loop import BareLoop
from trainers.config import ModelConfig, RunConfig
from trainers.config_io import override
from trainers.context import LocalContext
from trainers.loop import run_phase
from trainers.models import build_model
from trainers.phase import ActivePhase
from trainers.presets import PRESETS
from trainers.record import series
from trainers.run import Run
from trainers.seeds import stream_seed

QUIET = (
    "logging.every_steps=10",
    "checkpoint.every_minutes=null",
    "evaluation.every_epochs=null",
    "evaluation.max_tokens=4096",
    "samples.count=0",
    "device=cpu",
)
"""metrics every 10th step; no checkpoint and no evaluation before the end"""
TWO_MILLION = (
    *("model.d_model=200", "model.n_layers=4", "model.n_heads=8", "model.context_length=128"),
    *("model.dropout=0", "model.dropout_positions=false"),
)


def two_million(steps: int) -> RunConfig:
    """A GPT of 2 M parameters without dropout, 8 rows of 128 characters a step."""
    return override(PRESETS["fundamentallm/small"](), [*TWO_MILLION, *QUIET, f"budget.steps={steps}"])


def small_as_shipped(steps: int) -> RunConfig:
    """`fundamentallm/small`: 0.4 M parameters, dropout 0.1."""
    return override(PRESETS["fundamentallm/small"](), [*QUIET, f"budget.steps={steps}"])


# ---- our side --------------------------------------------------------------------------------------------


class BlockContext(LocalContext):
    """A context that asks for a stop after a given number of steps, so that the loop runs block by block."""

    def __init__(self, run_dir: Path, cache_dir: Path):
        super().__init__(run_dir, cache_dir)
        self._left = 0

    def allow(self, steps: int) -> None:
        self._left = steps

    def should_stop(self) -> str | None:
        reason = super().should_stop()
        self._left -= 1
        return "the block is over" if self._left < 0 else reason


@dataclass(frozen=True)
class OurLoop:
    """A run as `train` would drive it, up to the next block's end."""

    run: Run
    phase: ActivePhase
    ctx: BlockContext

    def steps(self, count: int) -> None:
        self.ctx.allow(count)
        run_phase(self.run, self.phase)

    def logged(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric of every step so far, as it stands in the record."""
        assert self.run.record is not None
        self.run.record.sync()
        return series(self.ctx.run_dir / "metrics.jsonl", name)


@contextmanager
def our_loop(config: RunConfig, folder: Path) -> Iterator[OurLoop]:
    """The run of `config` in `folder`, opened as `trainers.loop.train` opens it."""
    ctx = BlockContext(folder / "run", folder / ".cache")
    try:
        run = Run(config, ctx, build_model)
        try:
            run.restore()
            yield OurLoop(run, run.open_phase(), ctx)
        finally:
            run.close()
    finally:
        ctx.close()


@contextmanager
def scratch(directory: Path | None = None) -> Iterator[Path]:
    """A folder on the disk under test (TMPDIR's, or in `directory`), gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="benchmark-", dir=directory))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# ---- the bare side ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BareJob:
    """All that the bare loop needs, so that it computes what ours does."""

    model: ModelConfig
    vocab_size: int
    seed: int
    tokens: Path
    """the packed text, raw"""
    dtype: str
    length: int
    order: np.ndarray
    """int64 (steps, rows): row numbers of the packed text"""
    lrs: list[float]
    seeds: list[int] | None
    """of the dropout masks; None: no dropout"""

    @classmethod
    def of(cls, ours: OurLoop, steps: int) -> BareJob:
        """The same steps as `ours` will take from its beginning; its one packed text stays where it is."""
        run, phase = ours.run, ours.phase
        config = run.config
        (packed,) = phase.data.sources
        order = np.stack([phase.loader._order.picks(step)[0].rows for step in range(steps)])  # type: ignore[attr-defined]
        return cls(
            model=config.model,
            vocab_size=config.model.vocab_size or run.data.tokenizer.vocab_size,
            seed=config.seed,
            tokens=packed.path / "tokens.bin",  # type: ignore[union-attr]
            dtype=packed.meta["dtype"],  # type: ignore[union-attr]
            length=config.sequence_length,
            order=order,
            lrs=[phase.lr(step) for step in range(steps)],
            seeds=[stream_seed(config.seed, "dropout", step, 0, 0) for step in range(steps)]
            if phase.draws_noise
            else None,
        )

    def loop(self, model: nn.Module | None = None, dtype: torch.dtype | None = None) -> BareLoop:
        """The loop at step 0, on a copy of `model` where it is, or on freshly built weights, which are the same."""
        if model is None:
            torch.manual_seed(stream_seed(self.seed, "model"))
            model = build_model(self.model, self.vocab_size)
        tokens = np.memmap(self.tokens, dtype=self.dtype, mode="r")
        loop = BareLoop(copy.deepcopy(model), tokens, self.order, self.length, self.lrs)
        loop.seeds, loop.dtype = self.seeds, dtype
        return loop

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        np.save(folder / "order.npy", self.order)
        (folder / "job.json").write_text(
            json.dumps(
                {
                    "model": self.model.model_dump(mode="json"),
                    **{name: getattr(self, name) for name in ("vocab_size", "seed", "dtype", "length", "lrs", "seeds")},
                    "tokens": str(self.tokens),
                }
            ),
            encoding="utf-8",
        )

    @classmethod
    def load(cls, folder: Path) -> BareJob:
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        model = ModelConfig.model_validate(job.pop("model"))
        return cls(model=model, tokens=Path(job.pop("tokens")), order=np.load(folder / "order.npy"), **job)
