"""Batch k of packed data is arithmetic, for any number of workers and micro-batches."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainers.config import BatchConfig, DataConfig, ModelConfig, RunConfig, SourceConfig
from trainers.data.loader import RowLoader, build_loader
from trainers.data.types import PhaseData
from trainers.errors import ConfigError, DataError

S = 8  # tokens a row


@dataclass
class Text:
    """As much of PackedTokens as a loader reads."""

    tokens: np.ndarray


def text(rows: int, first: int = 0, spare: int = 3, dtype: Any = np.uint16) -> Text:
    """A text of `rows` rows and some tokens left over, each token different from the others."""
    return Text(np.arange(first, first + rows * S + 1 + spare, dtype=dtype))


def loader(
    *texts: Text, weights: tuple[float, ...] | None = None, sequences: int = 4, micro: int | None = None,
    ranks: int = 1, rank: int = 0, seed: int = 42, order: str = "shuffled", phase: int = 0,
) -> RowLoader:  # fmt: skip
    sources = tuple(
        SourceConfig(corpus=f"text-{index}", weight=None if weights is None else weights[index])
        for index in range(len(texts))
    )
    config = RunConfig(
        seed=seed,
        workers=ranks,
        model=ModelConfig(context_length=S),
        data=DataConfig(sources=sources, order=order),
        batch=BatchConfig(sequences=sequences, micro_sequences=micro),
    )
    data = PhaseData(texts, weights, texts[0])  # type: ignore[arg-type]
    resolved = config.resolved_phases()[0].model_copy(update={"index": phase})
    return build_loader(config, resolved, data, rank, ranks)


def inputs(loader: RowLoader, steps: range) -> np.ndarray:
    """(steps * rows, S)"""
    return np.concatenate([batch.tokens.numpy() for step in steps for batch in loader.micro_batches(step)])


def first_tokens(loader: RowLoader, steps: range) -> list[int]:
    return inputs(loader, steps)[:, 0].tolist()


# ---- one text, shuffled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_an_epoch_is_every_window_once(dtype: Any) -> None:
    one = loader(text(20, dtype=dtype))
    assert one.steps_per_epoch == 5
    rows = inputs(one, range(5))
    assert sorted(rows[:, 0].tolist()) == list(range(0, 160, S))
    assert (rows == rows[:, :1] + np.arange(S)).all()
    assert rows[:, 0].tolist() != sorted(rows[:, 0].tolist())  # and it is shuffled


def test_targets_are_the_next_tokens_and_all_are_scored() -> None:
    for batch in loader(text(20), micro=2).micro_batches(3):
        assert (batch.targets == batch.tokens + 1).all()
        assert batch.n_targets == batch.targets.numel() == 2 * S
        assert str(batch.tokens.dtype) == str(batch.targets.dtype) == "torch.int64"
        assert batch.tokens.is_contiguous() and batch.targets.is_contiguous()


def test_the_last_window_needs_its_last_target() -> None:
    assert loader(text(4, spare=0)).steps_per_epoch == 1
    with pytest.raises(DataError, match="gives only 3"):
        loader(Text(text(4, spare=0).tokens[:-1]))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (1, 1), (2, 6), (2, 3), (3, 4), (3, 2), (4, 1), (12, 1)])
def test_workers_and_accumulation_do_not_change_the_rows_or_their_order(ranks: int, micro: int) -> None:
    one, mixed = text(100), text(40, first=5000)
    for texts, weights, order in (((one,), None, "shuffled"), ((one, mixed), (0.7, 0.3), "shuffled"),
                                  ((one,), None, "streams"), ((one, mixed), None, "shuffled")):  # fmt: skip
        whole = loader(*texts, weights=weights, order=order, sequences=12)
        parts = [
            loader(*texts, weights=weights, order=order, sequences=12, micro=micro, ranks=ranks, rank=rank)
            for rank in range(ranks)
        ]
        for step in (0, 1, 9, 25):
            batches = [part.micro_batches(step) for part in parts]
            assert {len(batch) for batch in batches} == {12 // ranks // micro}
            together = np.concatenate([batch.tokens.numpy() for rank in batches for batch in rank])
            assert (together == whole.micro_batches(step)[0].tokens.numpy()).all()


def test_a_step_depends_on_its_number_alone() -> None:
    forwards = loader(text(1000))
    expected = {step: first_tokens(forwards, range(step, step + 1)) for step in range(0, 1200, 7)}
    backwards = loader(text(1000))
    for step in sorted(expected, reverse=True):
        assert first_tokens(backwards, range(step, step + 1)) == expected[step]
    assert backwards.state() == {}
    backwards.restore({})
    assert expected[7] != expected[14]


def test_the_step_rows_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = first_tokens(loader(text(103)), range(60))
    monkeypatch.setattr("trainers.data.order.CHUNK", 1)
    assert first_tokens(loader(text(103)), range(60)) == expected


def test_seed_phase_and_epoch_each_change_the_order() -> None:
    orders = [
        first_tokens(loader(text(40)), range(10)),
        first_tokens(loader(text(40)), range(10, 20)),
        first_tokens(loader(text(40), seed=43), range(10)),
        first_tokens(loader(text(40), phase=1), range(10)),
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_the_rows_that_an_epoch_drops_differ_from_epoch_to_epoch() -> None:
    one = loader(text(23))
    assert one.steps_per_epoch == 5
    seen = [set(first_tokens(one, range(5 * epoch, 5 * epoch + 5))) for epoch in range(8)]
    assert all(len(rows) == 20 for rows in seen)
    assert set().union(*seen) == set(range(0, 23 * S, S))
    assert len({frozenset(rows) for rows in seen}) > 1


def test_a_memory_mapped_text_reads_the_same(tmp_path: Path) -> None:
    text(50).tokens.tofile(tmp_path / "tokens.bin")
    mapped = Text(np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r"))
    assert (inputs(loader(mapped), range(12)) == inputs(loader(text(50)), range(12))).all()


def test_a_text_too_short_for_one_step_is_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match=r"takes 4 rows of 8 tokens, but text-0 gives only 3\. .*at most 3"):
        loader(text(3))
    with pytest.raises(DataError, match=r"at least one row of data.sequence_length \+ 1 = 9 tokens"):
        loader(Text(np.arange(5, dtype=np.uint16)))
    with pytest.raises(DataError, match="at least one row"):
        loader(Text(np.array([], dtype=np.uint16)))


def test_a_batch_that_does_not_divide_among_the_ranks_there_are_is_refused() -> None:
    config = RunConfig(model=ModelConfig(context_length=S), batch=BatchConfig(sequences=8))
    with pytest.raises(ConfigError, match=r"1 x 3 = 3\)\. Nearest: 6"):
        build_loader(config, config.resolved_phases()[0], PhaseData((text(9),), None, text(9)), 0, 3)  # type: ignore[arg-type]


# ---- several texts --------------------------------------------------------------------------------------------------


def test_joined_texts_are_one_text_whose_rows_never_cross() -> None:
    both = loader(text(11), text(9, first=1000))
    assert both.steps_per_epoch == 5
    rows = inputs(both, range(5))
    assert sorted(rows[:, 0].tolist()) == [*range(0, 88, S), *range(1000, 1072, S)]
    assert (rows == rows[:, :1] + np.arange(S)).all()


def test_a_mixture_keeps_its_shares_and_every_source_gives_all_rows_before_one_twice() -> None:
    sizes, firsts = (300, 90, 7), (0, 10_000, 20_000)
    texts = [text(size, first=first) for size, first in zip(sizes, firsts, strict=True)]
    one = loader(*texts, weights=(0.5, 0.3, 0.2))
    assert one.steps_per_epoch == sum(sizes) // 4
    tokens = np.array(first_tokens(one, range(500)))
    sources = tokens // 10_000
    assert np.bincount(sources[:1000]).tolist() == np.bincount(sources[1000:]).tolist() == [500, 300, 200]
    for source, size in enumerate(sizes):
        mine = tokens[sources == source].tolist()
        epochs = [mine[start : start + size] for start in range(0, len(mine) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 0.8 * len(epochs) > 1


# ---- streams: the rows of consecutive steps continue -----------------------------------------------------------------


def continued(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return before[:, -1] + 1 == after[:, 0]


def test_streams_go_on_where_they_ended_and_say_where_they_start_anew() -> None:
    one = loader(text(23), order="streams")
    assert one.steps_per_epoch == 5
    steps = [one.micro_batches(step)[0] for step in range(12)]
    for step in range(1, 12):
        goes_on = continued(steps[step - 1].tokens.numpy(), steps[step].tokens.numpy())
        assert steps[step].starts is not None
        assert (goes_on == ~steps[step].starts.numpy()).all()
        assert goes_on.all() == (step % 5 != 0)
    assert steps[0].starts.all()
    assert inputs(one, range(5))[:, 0].tolist() != inputs(one, range(1, 6))[:, 0].tolist()
    shuffled = loader(text(23))  # negative control
    assert not continued(inputs(shuffled, range(1)), inputs(shuffled, range(1, 2))).all()
    assert shuffled.micro_batches(0)[0].starts is None


def test_streams_read_every_part_of_the_text_once_an_epoch() -> None:
    tokens = inputs(loader(text(20), order="streams"), range(5))
    assert Counter(tokens.ravel().tolist()) == Counter(range(160))


def test_a_stream_starts_anew_where_another_source_begins() -> None:
    both = loader(text(6), text(14, first=1000), order="streams")
    steps = [both.micro_batches(step)[0] for step in range(5)]
    for before, after in itertools.pairwise(steps):
        goes_on = continued(before.tokens.numpy(), after.tokens.numpy())
        assert (goes_on == ~after.starts.numpy()).all()
    assert [int(batch.starts.sum()) for batch in steps] == [4, 1, 0, 0, 0]


def test_weighted_streams_give_each_source_whole_rows_of_the_batch() -> None:
    both = loader(text(30), text(7, first=1000), weights=(0.75, 0.25), order="streams")
    steps = [both.micro_batches(step)[0] for step in range(20)]
    for step, batch in enumerate(steps):
        assert (batch.tokens[:, 0] // 1000 == np.array([0, 0, 0, 1])).all()
        assert batch.starts.tolist() == [step % 10 == 0] * 3 + [step % 7 == 0]
    with pytest.raises(DataError, match="every source needs a whole row of the batch"):
        loader(text(30), text(7), weights=(0.95, 0.05), order="streams")
    with pytest.raises(DataError, match="cut into 3 parts"):
        loader(text(2), text(7), weights=(0.75, 0.25), order="streams")
