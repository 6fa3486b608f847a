"""fit is a pure rule: the largest micro-batch that divides a worker's step and stays within the limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.config import BatchConfig, RunConfig
from trainers.memory.fit import DoesNotFit, Memory, divisors, fit, largest_divisor, worker_rows

BASE = RunConfig()


def config_of(sequences: int, workers: int) -> RunConfig:
    return BASE.model_copy(update={"batch": BatchConfig(sequences=sequences), "workers": workers})


@given(
    st.integers(1, 96), st.sampled_from([1, 2, 3]), st.integers(0, 50), st.integers(1, 9), st.integers(1, 600)
)  # fmt: skip
def test_the_batch_stays_and_the_largest_that_fits_is_taken(
    share: int, workers: int, fixed: int, a_row: int, limit: int
) -> None:
    config = config_of(share * workers, workers)
    memory = Memory(limit, lambda rows, accumulation: fixed + a_row * rows)
    possible = [rows for rows in divisors(share) if fixed + a_row * rows <= limit]
    if not possible:
        with pytest.raises(DoesNotFit, match="one row"):
            fit(config, memory)
        return
    fitted = RunConfig.model_validate(config.model_dump() | {"batch": fit(config, memory).model_dump()})
    assert fitted.sequences_per_step == config.sequences_per_step
    assert fitted.micro_sequences == max(possible)
    assert fitted.micro_sequences * fitted.accumulation * workers == config.sequences_per_step


@given(st.integers(1, 10).map(lambda power: 2**power), st.sampled_from([1, 2]))
def test_after_an_accident_the_micro_batch_halves_and_accumulation_doubles(share: int, workers: int) -> None:
    config = config_of(share * workers, workers)
    before, micro = config.accumulation, config.micro_sequences
    fitted = RunConfig.model_validate(config.model_dump() | {"batch": fit(config, Memory.below(micro)).model_dump()})
    assert (fitted.micro_sequences, fitted.accumulation) == (micro // 2, before * 2)


def test_one_row_cannot_be_halved() -> None:
    with pytest.raises(DoesNotFit):
        fit(config_of(4, 1), Memory.below(1))


def test_accumulation_counts() -> None:
    """Gradients that stand while a micro-batch runs may leave room for none but the whole batch."""
    config = config_of(8, 1)
    memory = Memory(100, lambda rows, accumulation: 10 * rows + (50 if accumulation > 1 else 0))
    assert fit(config, memory).micro_sequences == 8
    assert fit(config, Memory(79, memory.peak_bytes)).micro_sequences == 2


@given(st.integers(1, 500), st.integers(1, 500))
def test_largest_divisor(number: int, at_most: int) -> None:
    found = largest_divisor(number, at_most)
    assert number % found == 0 and found <= at_most
    assert not [each for each in range(found + 1, min(number, at_most) + 1) if number % each == 0]


def test_rows_are_a_workers() -> None:
    assert worker_rows(config_of(12, 3)) == 4
