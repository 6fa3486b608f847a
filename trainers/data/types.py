"""What the data rooms hand to each other and to the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

    from trainers.data.packed import PackedTokens
    from trainers.data.stream import StreamedSource

IGNORED = -100  # the target of a position that is not scored


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU."""

    tokens: torch.Tensor
    """int64 (rows, T): the inputs"""
    targets: torch.Tensor
    """int64 (rows, T): tokens shifted by one; IGNORED where nothing is scored"""
    n_targets: int
    """how many targets are scored, known without touching a device"""
    starts: torch.Tensor | None = None
    """bool (rows,): rows that do not go on where the same row of the step before ended, so that carried state must be
    reset there (data.order=streams); None: no row goes on"""


class Tokenizer(Protocol):
    """Text to ids and back. Saved with the run; `fingerprint` changes whenever an id could."""

    kind: str
    vocab_size: int
    eos_id: int | None
    """put between documents where there is one"""
    pad_id: int | None

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of one text, without specials."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...

    def save(self, directory: Path) -> None: ...


@dataclass(frozen=True)
class PhaseData:
    """The packed text one phase trains on and is scored on."""

    sources: tuple[PackedTokens | StreamedSource, ...]
    weights: tuple[float, ...] | None
    """shares of the sources, summing to 1; None: one source, or sources joined in order into one"""
    validation: PackedTokens


@dataclass(frozen=True)
class PreparedData:
    tokenizer: Tokenizer
    phases: tuple[PhaseData, ...]
    report: dict[str, Any]
    """what was read, trained on and held out, for the terminal and MLflow; JSON"""


class Loader(Protocol):
    """The batches of one phase for one rank. Step k is a function of (config, seed, k), never of history."""

    steps_per_epoch: int | None
    """None for a stream, whose length nobody knows"""

    def micro_batches(self, step: int) -> list[Batch]:
        """The `accumulation` micro-batches of step `step` of this phase (counted from 0) for this rank."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON; what `restore` needs besides the step (empty for packed data)."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...
