"""The rules of RunConfig, each with the configuration just inside it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from trainers.config import RunConfig, SourceConfig
from trainers.config_io import build_config, override
from trainers.errors import ConfigError
from trainers.presets import preset


@pytest.mark.parametrize(
    ("broken", "said", "mended"),
    [
        (["model.d_model=130"], "Nearest: d_model 128 or 132", ["model.d_model=132"]),
        (["model.d_model=6", "model.n_heads=2", "model.positions=rope"], "even head width", ["model.d_model=8"]),
        (["model.norm=deepnorm"], "norm_position=post", ["model.norm=deepnorm", "model.norm_position=post"]),
        (["data.sequence_length=65"], "must not exceed", ["data.sequence_length=64"]),
        (["batch.tokens=100"], "Nearest: 64", ["batch.tokens=64"]),
        (["workers=3"], "Nearest: 6 or 9", ["workers=4"]),
        (["batch.micro_sequences=3"], "Nearest: 6 or 9", ["batch.micro_sequences=2"]),
        (["tokenizer.kind=bpe"], "needs tokenizer.vocab_size", ["tokenizer.kind=bpe", "tokenizer.vocab_size=300"]),
        (["tokenizer.kind=bpe", "tokenizer.vocab_size=100"], "260", ["tokenizer.kind=bpe", "tokenizer.vocab_size=260"]),
        (["tokenizer.vocab_size=300"], "derives its vocabulary", []),
        (
            ["tokenizer.kind=bpe", "tokenizer.vocab_size=301", "model.vocab_size=300"],
            "must not exceed model.vocab_size",
            ["tokenizer.kind=bpe", "tokenizer.vocab_size=300", "model.vocab_size=300"],
        ),
        (["device=cpu", "precision.compute=fp16"], "30 times slower", ["device=cuda", "precision.compute=fp16"]),
        (
            ["data.sources=[{corpus: a, weight: 1}, {corpus: b}]"],
            "Missing on: b",
            ["data.sources=[{corpus: a, weight: 1}, {corpus: b, weight: 2}]"],
        ),
        (
            ["data.sources=[{corpus: 'hf:a/b', streaming: true}]"],
            "method=hash",
            ["data.sources=[{corpus: 'hf:a/b', streaming: true}]", "data.validation.method=hash"],
        ),
        (["data.sources=[]"], "at least 1 item", []),
        (["data.sources=[{corpus: ''}]"], "at least 1 character", []),
        (["evaluation.every_steps=5"], "", ["evaluation.every_epochs=5"]),
        (
            ["early_stopping.metric=val/accuracy"],
            "better the higher it is: set early_stopping.mode=max",
            ["early_stopping.metric=val/accuracy", "early_stopping.mode=max"],
        ),
        (["early_stopping.mode=max"], "set early_stopping.mode=min", ["early_stopping.metric=val/perplexity"]),
        (["seed=true"], "true and false mean nothing here", ["seed=1"]),
        (["optim.lr=0"], "greater than 0", ["optim.lr=1e-30"]),
        (["optim.lr=.inf"], "finite", []),
        (["model.dropout=.nan"], "finite", []),
        (["model.dropout=1"], "less than 1", ["model.dropout=0.99"]),
        (["budget.steps=9223372036854775808"], "less than", ["budget.steps=9223372036854775807"]),
        (["phases=[{name: a}, {name: a}]"], "must differ", ["phases=[{name: a}, {name: b}]"]),
        (["phases=[{name: '12'}]"], "not only digits", ["phases=[{name: 'a12'}]"]),
        (["budget=null"], "give the run a budget", ["budget=null", "phases=[{name: a, budget: {steps: 1}}]"]),
    ],
)
def test_a_rule_refuses_what_breaks_it_and_nothing_beside_it(broken: list[str], said: str, mended: list[str]) -> None:
    base = preset("fundamentallm/small")
    if said:
        with pytest.raises(ConfigError, match=said):
            override(base, broken)
    assert isinstance(override(base, mended), RunConfig)


def test_a_budget_that_no_phase_would_use_is_refused() -> None:
    two = preset("fundamentallm/two-phase")
    with pytest.raises(ConfigError, match=r"phases\.prose\.budget\.steps"):
        override(two, ["budget.steps=300"])


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().seed = 1  # type: ignore[misc]


def test_derived_sizes_multiply_to_the_step() -> None:
    config = build_config({"batch": {"sequences": 48, "micro_sequences": 4}, "workers": 3})
    assert config.micro_sequences * config.accumulation * config.workers == config.sequences_per_step == 48
    assert config.tokens_per_step == 48 * config.sequence_length


def test_a_phase_is_the_run_where_it_is_silent() -> None:
    config = override(
        preset("fundamentallm/small"), ["phases=[{name: a}, {name: b, model: {dropout: 0.3}}]", "phases.b.optim.lr=1"]
    )
    first, second = config.resolved_phases()
    assert (first.model, first.data, first.budget, first.optim) == (
        config.model,
        config.data,
        config.budget,
        config.optim,
    )
    assert second.model == config.model.model_copy(update={"dropout": 0.3})
    assert second.optim == config.optim.model_copy(update={"lr": 1.0})
    assert first.optim != second.optim


def test_the_only_phase_of_a_plain_run_is_the_run() -> None:
    config = RunConfig()
    (phase,) = config.resolved_phases()
    assert (phase.index, phase.name, phase.data.sources) == (0, "main", (SourceConfig(corpus="python-stdlib"),))
