"""A weighted mixture is arithmetic on the sample's number."""

from __future__ import annotations

import numpy as np
import pytest

from trainers.data.mixture import BLOCK, Mixture, quotas
from trainers.errors import DataError

WEIGHTS = (0.5, 0.3, 0.2)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1, 1), (334, 333, 333)),
        ((0.5, 0.3, 0.2), (500, 300, 200)),
        ((7,), (1000,)),
        ((0.9995, 0.0005), (1000, 0)),
        ((2, 1), (667, 333)),
    ],
)
def test_quotas_are_the_largest_remainders(weights: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert quotas(weights, 1000) == expected


def test_shares_are_exact_in_every_block() -> None:
    sources, _ = Mixture(WEIGHTS, 42, 0).locate(np.arange(5 * BLOCK))
    for block in sources.reshape(5, BLOCK):
        assert np.bincount(block).tolist() == [500, 300, 200]
    shifted = sources[37 : 37 + 4 * BLOCK].reshape(4, BLOCK)  # negative control: not so from anywhere
    assert any(np.bincount(block).tolist() != [500, 300, 200] for block in shifted)


def test_each_source_counts_its_own_samples_in_order() -> None:
    sources, ordinals = Mixture(WEIGHTS, 42, 0).locate(np.arange(3 * BLOCK))
    for source in range(3):
        assert ordinals[sources == source].tolist() == list(range(np.count_nonzero(sources == source)))


def test_a_sample_depends_on_its_number_alone() -> None:
    whole = Mixture(WEIGHTS, 42, 0).locate(np.arange(3 * BLOCK))
    for first, last in ((0, 8), (996, 1004), (1500, 1508), (999, 2001)):
        part = Mixture(WEIGHTS, 42, 0).locate(np.arange(first, last))
        assert (part[0] == whole[0][first:last]).all() and (part[1] == whole[1][first:last]).all()


def test_blocks_and_keys_have_orders_of_their_own() -> None:
    sources, _ = Mixture(WEIGHTS, 42, 0).locate(np.arange(2 * BLOCK))
    other, _ = Mixture(WEIGHTS, 43, 0).locate(np.arange(2 * BLOCK))
    assert (sources[:BLOCK] != sources[BLOCK:]).any()
    assert (sources != other).any()


def test_a_share_below_a_thousandth_is_refused() -> None:
    with pytest.raises(DataError, match="share of at least about 1/1000"):
        Mixture((1.0, 0.0001), 42, 0)
