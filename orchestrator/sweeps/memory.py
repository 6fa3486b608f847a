"""The micro-batch that memory allows: found once for a sweep, and frozen into every trial's configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.batch_finder import find_batch, model_bytes
from orchestrator.memory_limit import limit_for
from orchestrator.plan import BYTES_PER_VALUE
from search_spaces.domains import Choice, Float, Int
from search_spaces.space import Space
from search_spaces.trial import trial_config
from trainers.config import RunConfig
from trainers.data.types import PreparedData

AMPLE = 0.5  # of the memory: a guess below this needs no measuring
VALUES_A_TOKEN = 40  # of d_model that a layer keeps for the backward pass, generously
PROCESS_BYTES = 600 << 20  # Python, torch and their libraries


def micro_limit_of(
    base: RunConfig,
    space: Space,
    data: PreparedData,
    *,
    device: str,
    slots: int,
    threads: int,
    cache_dir: Path,
    say: Callable[[str], None],
) -> int | None:
    """The largest micro-batch that fits when `slots` trials share this machine; None: any batch of the space does.

    Measured in processes of their own (`find_batch`) on a GPU, and on a CPU where a generous guess comes near the
    memory there is. Raises UserError where not even one row fits.
    """
    largest = _with_largest_batch(base, space)
    limit = limit_for(device, None, slots * base.workers)
    share = largest.sequences_per_step // largest.workers
    if limit.bytes is not None and guessed_bytes(largest, data.tokenizer.vocab_size, share) < AMPLE * limit.bytes:
        return None
    say("looking for the micro-batch that fits")
    found = find_batch(
        largest, limit, cache_dir=cache_dir, threads=threads, most=share, steps=1, device=device, say=say, data=data
    )
    return None if found.largest.micro >= share else found.largest.micro


def _with_largest_batch(base: RunConfig, space: Space) -> RunConfig:
    domain = space.get("batch.sequences")
    if domain is None:
        return base
    most = max(domain.values) if isinstance(domain, Choice) else domain.high
    return trial_config({"batch.sequences": int(most)}, base) if isinstance(domain, Choice | Int | Float) else base


def guessed_bytes(config: RunConfig, vocab_size: int, rows: int) -> int:
    """Memory of one worker's process with so many rows in a micro-batch: what is surely enough."""
    tokens, model = rows * config.sequence_length, config.model
    attention = rows * model.n_heads * config.sequence_length**2 * model.n_layers
    activations = tokens * model.d_model * model.n_layers * VALUES_A_TOKEN + attention + 4 * tokens * vocab_size
    return PROCESS_BYTES + model_bytes(config, vocab_size) + activations * BYTES_PER_VALUE
