"""What a plan says about the data is what preparing it finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainers.data.hub_server import HubServer, jsonl, parquet
from trainers.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    SplitConfig,
    TokenizerConfig,
)
from trainers.data import survey as survey_module
from trainers.data.prepare import prepare, survey
from trainers.errors import ConfigError, DataError

pytest.importorskip("pyarrow")
pytest.importorskip("huggingface_hub.constants")
DOCUMENTS = [f"{number} naïve bottles hanging on the wall{'!' * (number % 5)}\n" for number in range(400)]


def config(*sources: SourceConfig, kind: str = "characters", method: str = "tail", **tokenizer: object) -> RunConfig:
    return RunConfig(
        data=DataConfig(sources=sources, validation=SplitConfig(method=method)),
        tokenizer=TokenizerConfig(kind=kind, **tokenizer),
        model=ModelConfig(context_length=16),
        batch=BatchConfig(sequences=2),
    )


@pytest.fixture
def sources(tmp_path: Path) -> list[SourceConfig]:
    (tmp_path / "a.txt").write_text("".join(DOCUMENTS))
    (tmp_path / "b.jsonl").write_bytes(jsonl(DOCUMENTS))
    return [SourceConfig(corpus=str(tmp_path / name)) for name in ("a.txt", "b.jsonl")]


@pytest.mark.parametrize("kind", ["characters", "bytes"])
@pytest.mark.parametrize("method", ["tail", "hash"])
@pytest.mark.parametrize("weighted", [False, True])
def test_counts_are_exact_where_they_are_said_to_be(
    sources: list[SourceConfig], tmp_path: Path, kind: str, method: str, weighted: bool
) -> None:
    if method == "hash":
        sources = [sources[1], SourceConfig(corpus="python-stdlib/prose")]
    if weighted:
        sources = [source.model_copy(update={"weight": 1.0}) for source in sources]
    one = config(*sources, kind=kind, method=method)
    before, found = survey(one), prepare(one, tmp_path / "cache")
    assert before.exact
    assert before.vocab_size == found.tokenizer.vocab_size
    (phase,) = before.phases
    assert list(phase.train_tokens) == [len(source) for source in found.phases[0].sources]
    assert phase.held_out_tokens == len(found.phases[0].validation)
    held_out = [part.n_chars for part in found.phases[0].validation.parts]
    assert [source.held_out_chars for source in phase.sources] == held_out


def test_a_vocabulary_to_be_trained_is_taken_as_configured_and_said(sources: list[SourceConfig]) -> None:
    found = survey(config(sources[0], kind="bpe", vocab_size=1024))
    assert (found.vocab_size, found.exact, found.bytes_per_token) == (1024, False, 2.0)
    assert "no tokenizer is trained" in found.notes[0]
    assert found.phases[0].total_train_tokens == round(found.phases[0].sources[0].train_bytes / 2.0)


def test_a_tokenizer_that_exists_is_measured(sources: list[SourceConfig], tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    trained = prepare(config(sources[0], kind="bpe", vocab_size=500), tmp_path / "cache")
    trained.tokenizer.save(tmp_path / "saved")
    found = survey(config(sources[0], kind="bpe", path=str(tmp_path / "saved" / "tokenizer.json")))
    assert found.phases[0].total_train_tokens == pytest.approx(len(trained.phases[0].sources[0]), rel=0.02)
    assert "measured" in found.notes[0]


def test_of_a_long_text_the_beginning_is_read_and_the_rest_extrapolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey_module, "WHOLE_BYTES", 2_000_000)
    text = "".join(DOCUMENTS) * 500  # 9 MB
    (tmp_path / "a.txt").write_text(text)
    found = survey(config(SourceConfig(corpus=str(tmp_path / "a.txt"))))
    assert not found.exact
    assert "extrapolated" in found.notes[0]
    assert found.phases[0].total_train_tokens == pytest.approx(len(text) * 0.9, rel=0.01)


def test_nothing_is_written_and_no_more_is_asked_of_the_hub_than_the_name(
    sources: list[SourceConfig], tmp_path: Path, local_hub: HubServer
) -> None:
    pytest.importorskip("datasets")
    local_hub.repositories |= {"own/surveyed": {"train.parquet": parquet(DOCUMENTS)}}
    before = sorted(tmp_path.rglob("*"))
    found = survey(config(*sources, SourceConfig(corpus="hf:own/surveyed")))
    assert sorted(tmp_path.rglob("*")) == before
    assert found.phases[0].total_train_tokens is None
    assert "train.parquet" not in local_hub.downloads()
    with pytest.raises(DataError, match="hf:own/missing"):
        survey(config(SourceConfig(corpus="hf:own/missing")))


def test_what_training_refuses_the_plan_refuses(tmp_path: Path) -> None:
    for content, message in [(b"abc", "too little text"), (b"a\0b", "NUL"), (b"", "empty")]:
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(DataError, match=message):
            survey(config(SourceConfig(corpus=str(tmp_path / "a.txt"))))
    with pytest.raises(DataError, match="no corpus"):
        survey(config(SourceConfig(corpus=str(tmp_path / "missing.txt"))))


@pytest.mark.parametrize("kind", ["characters", "bytes", "bpe"])
def test_a_run_that_starts_from_another_has_its_tokenizer(
    sources: list[SourceConfig], tmp_path: Path, kind: str
) -> None:
    """The other text has characters that the first one knows not, and the other way round."""
    wanted = {"vocab_size": 300} if kind == "bpe" else {}
    first = prepare(config(sources[0], kind=kind, **wanted), tmp_path / "cache")
    first.tokenizer.save(tmp_path / "run" / "tokenizer")
    (tmp_path / "other.txt").write_text("Ä zebra on the wall with 7 bottles in it is the best\n" * 400)
    other = config(SourceConfig(corpus=str(tmp_path / "other.txt")), kind=kind, **wanted)
    new = other.model_copy(update={"init_from": str(tmp_path / "run")})
    before, found = survey(new), prepare(new, tmp_path / "cache")
    assert before.vocab_size == found.tokenizer.vocab_size == first.tokenizer.vocab_size
    assert before.exact is (kind != "bpe")
    assert any("5.7% of the text is unknown" in note for note in before.notes) is (kind == "characters")
    assert ("unknown" in found.report["tokenizer"]) is (kind == "characters")
    near = 0.02 if kind == "bpe" else 0
    assert before.phases[0].total_train_tokens == pytest.approx(len(found.phases[0].sources[0]), rel=near)
    if kind == "characters":
        assert survey(other).vocab_size != before.vocab_size, "texts of one alphabet prove nothing"


def test_weights_that_know_another_tokenizer_are_refused(sources: list[SourceConfig], tmp_path: Path) -> None:
    prepare(config(sources[0], kind="bytes"), tmp_path / "cache").tokenizer.save(tmp_path / "run" / "tokenizer")
    new = config(sources[0]).model_copy(update={"init_from": str(tmp_path / "run")})
    for look in (survey, lambda config: prepare(config, tmp_path / "cache")):
        with pytest.raises(ConfigError, match=r"Set tokenizer\.kind=bytes"):
            look(new)
