"""A keyed permutation is a shuffle that nobody stores."""

from __future__ import annotations

import numpy as np
import pytest

from trainers.data.permutation import Permutation, permutation

GOLDEN_10 = [9, 5, 3, 2, 6, 7, 0, 8, 1, 4]
GOLDEN_MILLION = [901802, 995964, 258047, 938190, 93419, 640584]
SIZES = [*range(1, 40), 63, 64, 65, 1000, 1024, 1025, 4099]


@pytest.mark.parametrize("n", SIZES)
def test_every_index_is_hit_once(n: int) -> None:
    for key in (0, 1, "x"):
        assert sorted(Permutation(n, key)(np.arange(n)).tolist()) == list(range(n))


def test_large_domains_stay_inside_and_do_not_collide() -> None:
    n = 10**12 + 39
    images = Permutation(n, 7)(np.arange(200_000))
    assert images.min() >= 0 and images.max() < n
    assert np.unique(images).size == images.size


def test_an_index_goes_to_the_same_place_whatever_is_asked_beside_it() -> None:
    shuffle = Permutation(997, 3)
    whole = shuffle(np.arange(997))
    picked = np.array([996, 0, 500, 500, 13])
    assert (shuffle(picked) == whole[picked]).all()


def test_the_order_is_the_one_it_has_always_been() -> None:
    """Golden values: a checkpoint of an older version must go on with the same batches."""
    assert Permutation(10, 42, "epoch", 0, 0)(np.arange(10)).tolist() == GOLDEN_10
    assert Permutation(1_000_003, 42, "epoch", 0, 1)(np.arange(6)).tolist() == GOLDEN_MILLION


def test_every_part_of_the_key_changes_the_order() -> None:
    keys = [(42, "epoch", 0, 0), (42, "epoch", 0, 1), (42, "epoch", 1, 0), (43, "epoch", 0, 0), (42, "block", 0, 0)]
    orders = {tuple(permutation(100, *key)(np.arange(100)).tolist()) for key in keys}
    assert len(orders) == len(keys)


@pytest.mark.parametrize("n", [5, 10, 33])
def test_over_many_keys_every_index_goes_everywhere_equally_often(n: int) -> None:
    keys = 400 * n
    hits = np.zeros((n, n))
    for key in range(keys):
        hits[np.arange(n), Permutation(n, key)(np.arange(n))] += 1
    assert _chi_square(hits, keys / n) < 5 * np.sqrt(2)
    hits[0, 0] += 0.1 * keys  # negative control: a tenth of the keys left the first index where it was
    assert _chi_square(hits, keys / n) > 5 * np.sqrt(2)


def test_neighbours_do_not_stay_neighbours() -> None:
    order = Permutation(20_000, 5)(np.arange(20_000)).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(np.arange(20_000), order)[0, 1]) < 0.03


def _chi_square(hits: np.ndarray, expected: float) -> float:
    """Standard deviations from the mean of Pearson's statistic over the square root of its (n - 1)**2 freedoms."""
    freedoms = (len(hits) - 1) ** 2
    return float(((hits - expected) ** 2 / expected).sum() - freedoms) / np.sqrt(freedoms)
