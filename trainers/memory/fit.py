"""fit: the batch that memory allows, one rule for the planner, find-batch and the out-of-memory policy.

Pure, and without torch: what a micro-batch takes comes with the question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainers.config import BatchConfig, RunConfig
from trainers.errors import UserError


class DoesNotFit(UserError):
    """Not even a micro-batch of one row fits into memory."""


@dataclass(frozen=True)
class Memory:
    """What there is, and what is known of what a micro-batch takes."""

    limit_bytes: int
    peak_bytes: Callable[[int, int], float]
    """(rows, accumulation) -> bytes of one worker at most; predicted, measured, or what an accident taught"""

    @staticmethod
    def below(rows: int) -> Memory:
        """All that is known is that `rows` rows were too many: half of them are tried."""
        return Memory(rows // 2, lambda tried, accumulation: tried)


def fit(config: RunConfig, memory: Memory) -> BatchConfig:
    """`config.batch` with the largest micro-batch that fits; optimisation sees the same sequences a step.

    The micro-batch divides the rows of a worker's step, so accumulation makes up for it exactly. Raises DoesNotFit.
    """
    share = worker_rows(config)
    for rows in divisors(share):
        if memory.peak_bytes(rows, share // rows) <= memory.limit_bytes:
            return config.batch.model_copy(update={"micro_sequences": rows})
    raise DoesNotFit(
        f"not even a micro-batch of one row of {config.sequence_length:,} tokens fits. Lower data.sequence_length, set "
        f"model.activation_checkpointing=true, or make the model smaller."
    )


def worker_rows(config: RunConfig) -> int:
    """Rows that one worker trains on in each step."""
    return config.sequences_per_step // config.workers


def divisors(number: int) -> list[int]:
    """All of them, the largest first."""
    return [part for part in range(number, 0, -1) if number % part == 0]


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is no larger than `at_most`, which is at least 1."""
    return next(part for part in divisors(number) if part <= at_most)
