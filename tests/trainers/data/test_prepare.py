"""From a configuration to tokens: nothing held out is trained on, and nothing is done twice."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.trainers.data.hub_server import HubServer, jsonl
from trainers.config import (
    BatchConfig,
    BudgetConfig,
    DataConfig,
    ModelConfig,
    PhaseConfig,
    RunConfig,
    SourceConfig,
    SplitConfig,
    TokenizerConfig,
)
from trainers.data.packed import PackedTokens
from trainers.data.prepare import data_hashes, prepare
from trainers.data.splits import is_held_out
from trainers.data.stream import StreamedSource
from trainers.errors import ConfigError, DataError, UserError

pytest.importorskip("huggingface_hub.constants")
ROOT = Path(__file__).resolve().parents[3]
POEM = "The quick brown fox jumps over the lazy dog.\n  Pack my box with five dozen jugs.\n" * 40


def data(*corpora: Path | str, weights: tuple[float, ...] | None = None, method: str = "tail", fraction: float = 0.1):
    sources = tuple(
        SourceConfig(corpus=str(corpus), weight=None if weights is None else weights[index])
        for index, corpus in enumerate(corpora)
    )
    return DataConfig(sources=sources, validation=SplitConfig(method=method, fraction=fraction))


def run(of: DataConfig, kind: str = "characters", **fields: Any) -> RunConfig:
    vocab_size = None if kind in ("characters", "bytes") else 400
    fields = {"batch": BatchConfig(sequences=2), "model": ModelConfig(context_length=16), **fields}
    return RunConfig(data=of, tokenizer=TokenizerConfig(kind=kind, vocab_size=vocab_size), **fields)


def written(path: Path, text: str = POEM) -> Path:
    path.write_text(text)
    return path


def lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def test_one_text_is_trained_on_up_to_the_cut_and_scored_behind_it(tmp_path: Path) -> None:
    prepared = prepare(run(data(written(tmp_path / "a.txt"))), tmp_path / "cache")
    (phase,) = prepared.phases
    (source,) = phase.sources
    assert isinstance(source, PackedTokens)
    cut = int(len(POEM) * 0.9)
    assert prepared.tokenizer.decode(source.tokens) == POEM[:cut]  # one document: nothing is put in between
    assert prepared.tokenizer.decode(phase.validation.tokens) == POEM[cut:]
    assert source.tokens.tolist() == prepared.tokenizer.encode(POEM[:cut]).tolist()
    assert phase.weights is None


@pytest.mark.parametrize("kind", ["characters", "bpe", "sentencepiece_bpe"])
def test_the_tokenizer_never_sees_the_held_out_text(tmp_path: Path, kind: str) -> None:
    secret = "ßßßß" * 200
    prepared = prepare(run(data(written(tmp_path / "a.txt", POEM * 3 + secret)), kind), tmp_path / "cache")
    seen = prepare(run(data(written(tmp_path / "b.txt", secret + POEM * 3)), kind), tmp_path / "cache")
    if kind == "characters":
        assert prepared.tokenizer.encode("ß").tolist() == [1]
        assert set(prepared.phases[0].validation.tokens.tolist()[-800:]) == {1}
    assert len(prepared.tokenizer.encode(secret)) >= len(secret)
    # The control: where it is in the training text, the tokenizer knows it.
    assert seen.tokenizer.encode("ß").tolist() != [1]
    assert kind == "characters" or len(seen.tokenizer.encode(secret)) < len(secret)


def test_documents_held_out_by_hash_are_not_trained_on(tmp_path: Path) -> None:
    documents = [f"document {number} of this\n" for number in range(200)]
    config = run(data(lines(tmp_path / "a.jsonl", documents), method="hash", fraction=0.2), "bytes")
    prepared = prepare(config, tmp_path / "cache")
    (source,), validation = prepared.phases[0].sources, prepared.phases[0].validation

    def of(packed: PackedTokens) -> set[str]:
        ends = [*packed.document_starts.tolist()[1:], len(packed)]
        return {
            prepared.tokenizer.decode(packed.tokens[start:end])
            for start, end in zip(packed.document_starts.tolist(), ends, strict=True)
        }

    assert not of(source) & of(validation)
    assert of(source) | of(validation) == set(documents)
    assert (source.tokens == prepared.tokenizer.eos_id).sum() == len(of(source))


def test_sources_are_joined_or_mixed(tmp_path: Path) -> None:
    paths = written(tmp_path / "a.txt", "a" * 1000), written(tmp_path / "b.txt", "b" * 1000)
    joined = prepare(run(data(*paths)), tmp_path / "cache").phases[0]
    (source,) = joined.sources
    assert source.tokens.tolist() == [4] * 900 + [5] * 900  # each source is cut: no document ends in front
    assert joined.validation.tokens.tolist() == [4] * 100 + [3] + [5] * 100 + [3]
    mixed = prepare(run(data(*paths, weights=(3, 1))), tmp_path / "cache").phases[0]
    assert [source.tokens.tolist() for source in mixed.sources] == [[4] * 900, [5] * 900]
    assert mixed.weights == (0.75, 0.25)
    assert mixed.validation.tokens.tolist() == joined.validation.tokens.tolist()


def two_phases(first: DataConfig, second: DataConfig, **fields: Any) -> RunConfig:
    budget = BudgetConfig(steps=2)
    phases = (PhaseConfig(name="one", data=first, budget=budget), PhaseConfig(name="two", data=second, budget=budget))
    return run(first, phases=phases, budget=None, **fields)


def test_one_tokenizer_serves_all_phases(tmp_path: Path) -> None:
    paths = written(tmp_path / "a.txt", "a" * 1000), written(tmp_path / "b.txt", "b" * 1000)
    prepared = prepare(two_phases(data(paths[0]), data(paths[1])), tmp_path / "cache")
    assert prepared.tokenizer.vocab_size == 6
    assert [set(phase.sources[0].tokens.tolist()) for phase in prepared.phases] == [{4}, {5}]


def test_phases_that_would_train_on_what_another_holds_out_are_refused(tmp_path: Path) -> None:
    text, copy = written(tmp_path / "a.txt"), written(tmp_path / "copy.txt")
    for first, second in [
        (data(text), data(text, fraction=0.2)),
        (data(text), data(copy, fraction=0.2)),
        (data(text), data(tmp_path)),
        (data("python-stdlib"), data("python-stdlib/code")),
    ]:
        with pytest.raises(ConfigError, match="would be trained on"):
            prepare(two_phases(first, second), tmp_path / "cache")
    for first, second in [(data(text), data(text)), (data(text), data(copy))]:
        prepare(two_phases(first, second), tmp_path / "cache")


def test_the_second_time_nothing_is_read_and_no_torch_is_needed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt")
    script = textwrap.dedent("""
        import sys
        from trainers.config import DataConfig, RunConfig, SourceConfig
        from trainers.data import prepare
        config = RunConfig(data=DataConfig(sources=(SourceConfig(corpus=sys.argv[1]),)))
        told = []
        data = prepare.prepare(config, sys.argv[2], progress=lambda *one: told.append(one))
        print(len(told) > 0, data.phases[0].sources[0].sha256, data.tokenizer.fingerprint, "torch" in sys.modules)
        prepare.survey(config)
        assert "torch" not in sys.modules
    """)
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "cache")]
    first, second = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(2))
    assert first.stdout.startswith("True ")
    assert second.stdout == first.stdout.replace("True", "False", 1)


def test_changed_text_is_packed_anew(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt")
    before = prepare(run(data(path)), tmp_path / "cache"), data_hashes(run(data(path)), tmp_path / "cache")
    written(path, POEM.replace("fox", "cat"))
    after = prepare(run(data(path)), tmp_path / "cache"), data_hashes(run(data(path)), tmp_path / "cache")
    assert before[1] != after[1]
    assert "cat" in after[0].tokenizer.decode(after[0].phases[0].sources[0].tokens)
    assert "fox" in before[0].tokenizer.decode(before[0].phases[0].sources[0].tokens)


def test_the_hashes_are_one_a_source_phase_by_phase(tmp_path: Path) -> None:
    paths = written(tmp_path / "a.txt", "a"), written(tmp_path / "b.txt", "b")
    hashes = data_hashes(two_phases(data(*paths), data(paths[0])))
    assert len(hashes) == 3
    assert hashes[0] == hashes[2] != hashes[1]
    assert data_hashes(two_phases(data(*paths), data(paths[0])), tmp_path / "cache") == hashes
    file = TokenizerConfig(kind="bpe", path=str(written(tmp_path / "tokenizer.json", "{}")))
    assert len(data_hashes(run(data(*paths)).model_copy(update={"tokenizer": file}))) == 3


def test_a_long_text_gives_the_tokenizer_an_even_sample(tmp_path: Path) -> None:
    text = "".join(f"{number:07d} is a number\n" for number in range(60_000))  # 1.3 MB
    config = run(data(written(tmp_path / "a.txt", text)), "bpe")
    config = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"sample_bytes": 500_000})})
    first = prepare(config, tmp_path / "one")
    assert 400_000 < first.report["tokenizer"]["trained_on_bytes"] <= 500_000
    assert prepare(config, tmp_path / "two").tokenizer.fingerprint == first.tokenizer.fingerprint
    whole = prepare(run(data(tmp_path / "a.txt"), "bpe"), tmp_path / "one")
    assert whole.report["tokenizer"]["trained_on_bytes"] == int(len(text) * 0.9)


def test_the_report_says_what_is_held_out(tmp_path: Path) -> None:
    report = prepare(run(data(written(tmp_path / "a.txt", "日" * 1000))), tmp_path / "cache").report
    (phase,) = report["phases"]
    assert phase["sources"][0]["held_out"] == {"n_chars": 100, "n_bytes": 300, "n_documents": 1, "n_tokens": 100}
    assert phase["train_tokens"] == [900]
    assert json.loads(json.dumps(report)) == report | {"phases": [phase | {"weights": None}]}


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"abc", "too little text. Training needs at least 33 tokens"),
        (b"x" * 30, "at least 33 tokens (data.sequence_length 16 x 2 sequences a step + 1)"),
        (b"ab\0cd" * 100, "NUL at byte 2"),
        (b"\xff\xfe" * 100, "UTF-16"),
        (b"abc\xff" * 100, "not UTF-8 at byte 3"),
        (gzip.compress(POEM.encode()), "looks like gzip"),
    ],
)
def test_bad_texts_are_refused_once_and_leave_no_packed_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare(run(data(tmp_path / "a.txt"), "bpe"), tmp_path / "cache")
    assert message in str(caught.value)
    assert "a.txt" in str(caught.value)
    assert not list((tmp_path / "cache").rglob("tokens.bin"))


def test_the_least_text_that_is_said_to_do_does(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "x" * 30)
    with pytest.raises(DataError) as caught:
        prepare(run(data(path)), tmp_path / "cache")
    enough = int(str(caught.value).split("as tokens at least ")[1].split()[0])
    prepare(run(data(written(path, "x" * enough))), tmp_path / "cache")
    with pytest.raises(DataError):
        prepare(run(data(written(path, "x" * (enough - 3)))), tmp_path / "cache")


def test_a_cache_that_is_a_file_or_forbidden_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "cache")
    with pytest.raises(UserError, match="cache"):
        prepare(run(data(written(tmp_path / "a.txt"))), tmp_path / "cache")


def test_crlf_and_lf_train_alike(tmp_path: Path) -> None:
    one, two = tmp_path / "lf.txt", tmp_path / "crlf.txt"
    one.write_bytes(POEM.encode())
    two.write_bytes(POEM.replace("\n", "\r\n").encode())
    packed = [prepare(run(data(path)), tmp_path / "cache").phases[0].sources[0] for path in (one, two)]
    assert packed[0].sha256 == packed[1].sha256


# ---- Hub datasets --------------------------------------------------------------------------------------------------


def test_a_stream_is_scored_on_held_out_documents_and_packs_nothing_else(tmp_path: Path, local_hub: HubServer) -> None:
    pytest.importorskip("datasets")
    documents = [f"document {number} of this\n" for number in range(300)]
    local_hub.repositories |= {"own/prepared": {"train.jsonl": jsonl(documents)}}
    stream = SourceConfig(corpus="hf:own/prepared", streaming=True, weight=1.0)
    text = SourceConfig(corpus=str(written(tmp_path / "a.txt")), weight=1.0)
    of = DataConfig(
        sources=(stream,), validation=SplitConfig(method="hash", fraction=0.2), stream_validation_documents=9
    )
    prepared = prepare(run(of), tmp_path / "cache")
    (phase,) = prepared.phases
    assert isinstance(phase.sources[0], StreamedSource)
    held_out = [document for document in documents if is_held_out(document, 0.2)]
    assert prepared.tokenizer.decode(phase.validation.tokens) == "".join(held_out[:9])
    (source,) = prepared.report["phases"][0]["sources"]
    assert (source["kind"], source["train"]) == ("stream", None)
    assert data_hashes(run(of)) == data_hashes(run(of))

    local_hub.log.clear()
    prepare(run(of), tmp_path / "cache")
    assert not local_hub.downloads()  # the second time only the commit is asked for
    local_hub.repositories["own/prepared"] = {"train.jsonl": jsonl([*documents, "one more"])}
    changed = prepare(run(of), tmp_path / "cache")
    assert changed.report["phases"][0]["sources"][0]["content_hash"] != source["content_hash"]

    with pytest.raises(ConfigError, match="Give every source a weight"):
        joined = tuple(one.model_copy(update={"weight": None}) for one in (stream, text))
        prepare(run(DataConfig(sources=joined, validation=of.validation)), tmp_path / "cache")
    with pytest.raises(ConfigError, match="only hf:OWNER/NAME streams"):
        wrong = (text.model_copy(update={"streaming": True}),)
        prepare(run(DataConfig(sources=wrong, validation=of.validation)), tmp_path / "cache")


# ---- real text -----------------------------------------------------------------------------------------------------


def test_shakespeare_has_65_characters_and_the_split_of_the_guide(shared_data: Path, tmp_path: Path) -> None:
    config = run(data(shared_data / "tinyshakespeare.txt"), model=ModelConfig(context_length=64))
    prepared = prepare(config, tmp_path / "cache")
    assert prepared.tokenizer.vocab_size == 69  # 4 specials and 65 characters, all in the first 90%
    assert (len(prepared.phases[0].sources[0]), len(prepared.phases[0].validation)) == (1_003_854, 111_540)


# ---- memory --------------------------------------------------------------------------------------------------------

GROWTH = """
import sys
from trainers.config import DataConfig, RunConfig, SourceConfig, TokenizerConfig
from trainers.data.prepare import prepare

def anonymous():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))

path, cache, kind, sample = sys.argv[1:]
trained = {"vocab_size": 1000, "sample_bytes": int(sample)} if kind != "characters" else {}
data = DataConfig(sources=(SourceConfig(corpus=path),))
config = RunConfig(data=data, tokenizer=TokenizerConfig(kind=kind, **trained))
before, peak = anonymous(), 0

def watch(*told):
    global peak
    peak = max(peak, anonymous())

prepare(config, cache, progress=watch)
watch()
print((peak - before) // 1024)
"""


def _growth_mib(path: Path, cache: Path, kind: str, sample: int) -> int:
    command = [sys.executable, "-c", GROWTH, str(path), str(cache), kind, str(sample)]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def _long_text(path: Path, megabytes: int) -> Path:
    some = "".join(f"{number} green bottles hanging on the wall, naïve ones;\n" for number in range(20_000)).encode()
    with path.open("wb") as file:
        for _ in range(megabytes * 1_000_000 // len(some)):
            file.write(some)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")
def test_a_long_text_passes_through_little_memory(tmp_path: Path) -> None:
    path = _long_text(tmp_path / "long.txt", 80)
    assert _growth_mib(path, tmp_path / "cache", "characters", 0) < 120  # the text as Python strings is four times more


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")
@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, kind: str) -> None:
    megabytes = {"characters": 2000, "bpe": 120}[kind]
    path = _long_text(tmp_path / "long.txt", megabytes)
    assert _growth_mib(path, tmp_path / "cache", kind, 200_000_000) < 800
