"""A streaming corpus trains while it downloads and goes on exactly; a local Hub stands in for the real one."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.trainers.data.hub_server import HubServer, jsonl, parquet
from trainers.config import BatchConfig, DataConfig, ModelConfig, RunConfig, SourceConfig, SplitConfig
from trainers.data.hub import HubText, resolve_revision
from trainers.data.loader import RowLoader, build_loader
from trainers.data.splits import is_held_out
from trainers.data.stream import StreamedSource, open_stream, training_sample, validation_documents
from trainers.data.types import PhaseData
from trainers.errors import DataError

pytest.importorskip("datasets")

S, SEQUENCES, BLOCK = 16, 4, 24  # a block is 6 steps
FRACTION = 0.2
EOS = 256
DOCUMENTS = [f"{number}: " + "abcdefghij"[: number % 10] * (number % 7) for number in range(300)]
TRAINING = [text for text in DOCUMENTS if not is_held_out(text, FRACTION)]
SHARDS = [DOCUMENTS[start : start + 60] for start in range(0, 300, 60)]


class Bytes:
    """As much of a Tokenizer as a stream uses."""

    kind, vocab_size, eos_id, pad_id, fingerprint = "bytes", 257, EOS, None, "bytes"

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]


@dataclass
class Text:
    tokens: np.ndarray


@pytest.fixture(scope="module")
def hub(local_hub: HubServer) -> HubServer:
    local_hub.repositories |= {
        "own/parquet": {f"data/train-{n:05d}-of-00005.parquet": parquet(one, group=25) for n, one in enumerate(SHARDS)},
        "own/jsonl": {f"train-{n}.jsonl": jsonl(one) for n, one in enumerate(SHARDS)},
        "own/large": {f"train-{n}.jsonl": jsonl(one * 8) for n, one in enumerate(SHARDS)},
        "own/broken": {"train.jsonl": jsonl(DOCUMENTS[:40]) + b'{"text": "cut off\n'},
        "own/odd": {"train.jsonl": jsonl(["", "a\0b"] * 9) + b'{"text": null}\n' + jsonl(["one\r\ntwo\r"])},
        "own/held-out": {"train.jsonl": jsonl([text for text in DOCUMENTS if text not in TRAINING])},
    }
    return local_hub


@pytest.fixture
def opened() -> Iterator[list[RowLoader]]:
    """Loaders that end with the test."""
    loaders: list[RowLoader] = []
    yield loaders
    for loader in loaders:
        loader.close()


PACKED = Text(np.arange(1000, 1000 + 40 * S + 1, dtype=np.uint16))


def stream(repository: str = "own/parquet", revision: str | None = None, **source: Any) -> StreamedSource:
    data = DataConfig(
        sources=(SourceConfig(corpus=f"hf:{repository}", streaming=True, **source),),
        validation=SplitConfig(method="hash", fraction=FRACTION),
        stream_block=BLOCK,
    )
    return open_stream(data.sources[0], Bytes(), data, revision)  # type: ignore[arg-type]


def loader(
    *sources: Any, weights: tuple[float, ...] | None = None, ranks: int = 1, rank: int = 0, micro: int | None = None,
    order: str = "shuffled",
) -> RowLoader:  # fmt: skip
    config = RunConfig(
        workers=ranks,
        model=ModelConfig(context_length=S),
        batch=BatchConfig(sequences=SEQUENCES, micro_sequences=micro),
        data=DataConfig(order=order, sources=tuple(SourceConfig(corpus=f"text-{n}") for n in range(len(sources)))),
    )
    data = PhaseData(sources, weights, PACKED)  # type: ignore[arg-type]
    return build_loader(config, config.resolved_phases()[0], data, rank, ranks)


def batches(loader: RowLoader, steps: range) -> list[bytes]:
    return [
        b"".join(
            batch.tokens.numpy().tobytes() + batch.targets.numpy().tobytes() for batch in loader.micro_batches(step)
        )
        for step in steps
    ]


def rows(loader: RowLoader, steps: range) -> np.ndarray:
    """(steps * rows, S + 1)"""
    found = [batch for step in steps for batch in loader.micro_batches(step)]
    return np.concatenate([np.concatenate([b.tokens.numpy(), b.targets.numpy()[:, -1:]], axis=1) for b in found])


def windows(epochs: int) -> np.ndarray:
    """(rows, S + 1): what a stream holds in the order of the text, made the plain way."""
    one = b"".join(text.encode() + b"\xff" for text in TRAINING) * epochs
    tokens = np.frombuffer(one, dtype=np.uint8).astype(np.int64)
    tokens[tokens == 255] = EOS
    return np.stack([tokens[start : start + S + 1] for start in range(0, len(tokens) - S, S)])


STEPS_AN_EPOCH = len(windows(1)) // SEQUENCES


# ---- what a stream gives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repository", ["own/parquet", "own/jsonl"])
def test_each_block_holds_its_windows_of_the_training_text_in_an_order_of_its_own(
    hub: HubServer, opened: list[RowLoader], repository: str
) -> None:
    opened.append(loader(stream(repository)))
    blocks = rows(opened[0], range(20 * BLOCK // SEQUENCES)).reshape(20, BLOCK, S + 1)
    expected = windows(4)[: 20 * BLOCK].reshape(20, BLOCK, S + 1)
    assert len(expected) * BLOCK > len(windows(1))  # more than an epoch
    orders = set()
    for block, plain in zip(blocks, expected, strict=True):
        assert sorted(map(bytes, block)) == sorted(map(bytes, plain))
        orders.add(tuple(int(np.flatnonzero((plain == row).all(axis=1))[0]) for row in block))
    assert len(orders) == 20


def test_the_first_batch_is_there_before_the_last_shard_was_asked_for(hub: HubServer, opened: list[RowLoader]) -> None:
    hub.log.clear()
    opened.append(loader(stream("own/large")))
    opened[0].micro_batches(0)
    asked = hub.downloads()
    assert "train-0.jsonl" in asked and "train-4.jsonl" not in asked
    batches(opened[0], range(1, 8 * STEPS_AN_EPOCH))  # negative control: the log does show it later
    assert "train-4.jsonl" in hub.downloads()


def test_reading_ahead_is_bounded(hub: HubServer, opened: list[RowLoader]) -> None:
    hub.log.clear()
    opened.append(loader(stream("own/large")))
    opened[0].micro_batches(0)
    time.sleep(0.5)  # time enough to download everything, had the reader no bound
    assert "train-4.jsonl" not in hub.downloads()


@pytest.mark.parametrize(("ranks", "micro"), [(2, 2), (2, 1), (4, 1), (1, 1)])
def test_every_rank_reads_the_stream_and_keeps_its_rows(
    hub: HubServer, opened: list[RowLoader], ranks: int, micro: int
) -> None:
    revision = resolve_revision(stream().text.source)
    whole = loader(stream(revision=revision))
    parts = [loader(stream(revision=revision), ranks=ranks, rank=rank, micro=micro) for rank in range(ranks)]
    opened += [whole, *parts]
    for step in range(15):
        together = np.concatenate([rows(part, range(step, step + 1)) for part in parts])
        assert (together == rows(whole, range(step, step + 1))).all()


def test_a_streamed_mixture_keeps_its_shares(hub: HubServer, opened: list[RowLoader]) -> None:
    opened.append(loader(stream(), PACKED, weights=(0.6, 0.4)))
    assert opened[0].steps_per_epoch is None
    found = rows(opened[0], range(250))
    packed = found[:, 0] >= 1000
    assert packed.sum() == 400
    first_epoch = found[packed][:40]
    assert sorted(first_epoch[:, 0].tolist()) == list(range(1000, 1000 + 40 * S, S))
    block = found[~packed][:BLOCK]
    assert sorted(map(bytes, block)) == sorted(map(bytes, windows(1)[:BLOCK]))


# ---- going on -------------------------------------------------------------------------------------------------------

END = STEPS_AN_EPOCH + 20
STOPS = {
    "at the start": (0,),
    "inside the first block": (3,),
    "at the end of a block": (6,),
    "behind it": (7,),
    "inside a later block": (34,),
    "at the end of the epoch": (STEPS_AN_EPOCH,),
    "behind it, twice": (STEPS_AN_EPOCH + 1, STEPS_AN_EPOCH + 9),
    "twice in one block": (8, 10),
}


def interrupted(sources: Any, stops: tuple[int, ...], end: int, opened: list[RowLoader], **options: Any) -> list[bytes]:
    """The batches of a loader that is thrown away at each stop and made again from its state."""
    found: list[bytes] = []
    state = None
    for first, last in itertools.pairwise((0, *stops, end)):
        one = loader(*sources(), **options)
        opened.append(one)
        if state is not None:
            one.restore(json.loads(state))
        found += batches(one, range(first, last))
        state = json.dumps(one.state())
        one.close()
    return found


@pytest.fixture(scope="module")
def uninterrupted(hub: HubServer) -> dict[str, list[bytes]]:
    """The batches of steps 0 to END, by repository."""
    found = {}
    for repository in ("own/parquet", "own/jsonl"):
        one = loader(stream(repository))
        found[repository] = batches(one, range(END))
        one.close()
    return found


@pytest.mark.parametrize("stops", STOPS.values(), ids=STOPS.keys())
@pytest.mark.parametrize("repository", ["own/parquet", "own/jsonl"])
def test_an_interrupted_stream_gives_the_batches_of_the_uninterrupted(
    hub: HubServer,
    uninterrupted: dict[str, list[bytes]],
    opened: list[RowLoader],
    repository: str,
    stops: tuple[int, ...],
) -> None:
    assert interrupted(lambda: (stream(repository),), stops, END, opened) == uninterrupted[repository]


@pytest.mark.parametrize("stops", [(2,), (17, 40), (STEPS_AN_EPOCH,)])
def test_an_interrupted_streamed_mixture_gives_the_batches_of_the_uninterrupted(
    hub: HubServer, opened: list[RowLoader], stops: tuple[int, ...]
) -> None:
    def sources() -> tuple[Any, ...]:
        return (stream(), PACKED, stream("own/jsonl"))

    options = {"weights": (0.5, 0.2, 0.3)}
    assert interrupted(sources, stops, END, opened, **options) == interrupted(sources, (), END, opened, **options)


@pytest.mark.parametrize("withheld", ["token", "document", "block"])
def test_without_any_piece_of_its_state_a_stream_goes_elsewhere(
    hub: HubServer, opened: list[RowLoader], withheld: str
) -> None:
    """The negative control of the laws above."""
    stop = 40
    whole = loader(stream())
    opened.append(whole)
    batches(whole, range(stop))
    state = json.loads(json.dumps(whole.state()))
    expected = batches(whole, range(stop, stop + 5))
    for tamper in (False, True):
        again = loader(stream())
        opened.append(again)
        if tamper:
            assert state["0"][withheld] not in (0, None)
            state["0"][withheld] = {"token": 0, "document": None, "block": state["0"]["block"] - 1}[withheld]
        again.restore(state)
        assert (batches(again, range(stop, stop + 5)) == expected) is not tamper


def test_a_rank_goes_on_from_the_state_of_any_other(hub: HubServer, opened: list[RowLoader]) -> None:
    def part(rank: int) -> RowLoader:
        opened.append(loader(stream(), ranks=2, rank=rank))
        return opened[-1]

    for stop in (5, 6, 9):
        old = [part(rank) for rank in range(2)]
        for one in old:
            batches(one, range(stop))
        new = [part(rank) for rank in range(2)]
        for one, other in zip(new, reversed(old), strict=True):
            one.restore(other.state())
        for one, other in zip(new, old, strict=True):
            assert batches(one, range(stop, stop + 8)) == batches(other, range(stop, stop + 8))


def test_the_state_does_not_grow(hub: HubServer, opened: list[RowLoader]) -> None:
    opened.append(loader(stream()))
    sizes = set()
    for step in range(END):
        opened[0].micro_batches(step)
        if step > BLOCK:
            sizes.add(len(json.dumps(opened[0].state())))
    assert max(sizes) - min(sizes) < 20  # digits of the numbers


def test_a_dataset_that_has_moved_on_is_refused(hub: HubServer, opened: list[RowLoader]) -> None:
    hub.repositories["own/moving"] = {"train.jsonl": jsonl(DOCUMENTS)}
    opened.append(loader(stream("own/moving")))
    opened[0].micro_batches(0)
    hub.repositories["own/moving"] = {"train.jsonl": jsonl(DOCUMENTS[1:])}
    opened.append(loader(stream("own/moving")))
    with pytest.raises(DataError, match=r"has read hf:own/moving at commit [0-9a-f]{40}, .* Set revision="):
        opened[1].restore(opened[0].state())


def test_a_stream_is_not_read_backwards(hub: HubServer, opened: list[RowLoader]) -> None:
    opened.append(loader(stream()))
    opened[0].micro_batches(20)
    with pytest.raises(AssertionError, match="forwards"):
        opened[0].micro_batches(2)


# ---- what is held out -----------------------------------------------------------------------------------------------


def test_held_out_documents_are_fixed_and_never_trained_on(hub: HubServer, opened: list[RowLoader]) -> None:
    text = stream().text
    held_out = validation_documents(text, FRACTION, 20)
    assert held_out == [one for one in DOCUMENTS if one not in TRAINING][:20]
    assert list(training_sample(text, FRACTION, 10**6)) == TRAINING
    assert list(training_sample(text, FRACTION, 100)) == TRAINING[: len(list(training_sample(text, FRACTION, 100)))]
    assert sum(len(one) for one in training_sample(text, FRACTION, 100)) < 200
    assert abs(len(TRAINING) / len(DOCUMENTS) - (1 - FRACTION)) < 0.08
    with pytest.raises(DataError, match=r"none of the first 3 documents .* Raise the fraction"):
        validation_documents(text, 1e-9, 20, limit=3)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries below wait seconds between their own attempts."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.001)))
    monkeypatch.setattr("trainers.data.hub.FIRST_WAIT_S", 0.001)


@pytest.mark.parametrize("times", [1, 8])
@pytest.mark.parametrize("fault", ["fail", "cut"])
def test_a_connection_that_comes_back_changes_nothing(
    hub: HubServer, opened: list[RowLoader], no_waiting: None, fault: str, times: int
) -> None:
    opened.append(loader(stream("own/jsonl")))
    expected = batches(opened[0], range(STEPS_AN_EPOCH))
    hub.log.clear()
    getattr(hub, fault)(times, only="train-2")
    opened.append(loader(stream("own/jsonl")))
    assert batches(opened[1], range(STEPS_AN_EPOCH)) == expected
    assert hub.downloads().count("train-2.jsonl") > times


def test_a_connection_that_stays_away_is_an_error_in_the_caller(
    hub: HubServer, opened: list[RowLoader], no_waiting: None
) -> None:
    opened.append(loader(stream("own/jsonl")))
    hub.fail(10_000, only="train-2")
    try:
        with pytest.raises(DataError, match=r"connection .* hf:own/jsonl .* 6 attempts: .*500.* it goes on"):
            batches(opened[0], range(STEPS_AN_EPOCH))
    finally:
        hub.fail(0)


def test_bad_sources_are_told_with_the_way_out(hub: HubServer, opened: list[RowLoader]) -> None:
    with pytest.raises(DataError, match=r"does not give hf:own/unknown: RepositoryNotFoundError.*Check the name"):
        stream("own/unknown")
    with pytest.raises(DataError, match="write corpus as hf:OWNER/NAME"):
        open_stream(SourceConfig(corpus="text.txt"), Bytes(), DataConfig())  # type: ignore[arg-type]
    for source, message in {
        stream("own/jsonl", text_field="body"): r"no text in the field 'body'; its fields are text\. Set text_field",
        stream("own/jsonl", split="test"): "cannot read hf:own/jsonl .*Check corpus, subset, split",
        stream("own/broken"): "cannot read hf:own/broken",
        stream("own/odd", text_field="text.no"): "no text in the field",
        stream("own/held-out"): "holds no training text",
    }.items():
        opened.append(loader(source))
        with pytest.raises(DataError, match=message):
            opened[-1].micro_batches(0)
        with pytest.raises(DataError, match=message):  # and again, instead of waiting for ever
            opened[-1].micro_batches(0)


def test_records_without_text_are_passed_over(hub: HubServer) -> None:
    assert [one.text for one in stream("own/odd").text.documents()] == ["one\ntwo\n"]


def test_orders_that_a_stream_cannot_have_are_refused(hub: HubServer) -> None:
    with pytest.raises(DataError, match=r"data\.order=streams cuts a text of known length"):
        loader(stream(), order="streams")
    with pytest.raises(DataError, match="give every source of text-0, text-1 a weight"):
        loader(stream(), PACKED)


def test_closing_ends_the_thread(hub: HubServer) -> None:
    before = threading.active_count()
    one = loader(stream())
    one.micro_batches(0)
    assert any(thread.name == "read-ahead" for thread in threading.enumerate())
    one.close()
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())
    assert threading.active_count() <= before + 1  # the server's thread of the kept connection


def test_the_local_hub_serves_whole_datasets_too(hub: HubServer) -> None:
    import datasets

    for repository in ("own/parquet", "own/jsonl"):
        assert datasets.load_dataset(repository, split="train")["text"][:] == DOCUMENTS


def test_a_position_is_good_for_every_document(hub: HubServer) -> None:
    source = SourceConfig(corpus="hf:own/parquet", streaming=True)
    text = HubText(source, resolve_revision(source))
    documents = list(text.documents())
    assert [one.text for one in documents] == DOCUMENTS
    for number in (0, 23, 24, 25, 58, 59, 60, 61, 150, 298, 299):
        position = json.loads(json.dumps(documents[number].after))
        rest = list(text.documents(position))
        assert [one.text for one in rest] == DOCUMENTS[number + 1 :]
        if rest:  # a position behind a position
            later = json.loads(json.dumps(rest[len(rest) // 2].after))
            assert [one.text for one in text.documents(later)] == DOCUMENTS[number + 2 + len(rest) // 2 :]
