"""Parameter counts equal the closed forms and the published vectors to the unit, without allocating anything."""

from __future__ import annotations

import pytest
import torch

from trainers.config import ModelConfig
from trainers.errors import ConfigError
from trainers.models import build_model, parameter_count

FUNDAMENTALLM = {"small": (128, 4, 2, 64), "medium": (512, 8, 6, 256), "large": (768, 12, 12, 512)}
CODELM = {"tiny": (768, 12), "medium": (1024, 24), "large": (1600, 32), "xlarge": (1792, 36)}
GENESIS = {"microscope": (384, 77), "deep_narrow_40": (768, 40), "deep_narrow_48": (896, 48)}


def fundamentallm(size: str) -> ModelConfig:
    d_model, n_heads, n_layers, context_length = FUNDAMENTALLM[size]
    return ModelConfig(d_model=d_model, n_heads=n_heads, n_layers=n_layers, context_length=context_length)


def codelm(size: str, **changes: object) -> ModelConfig:
    d_model, n_layers = CODELM[size]
    settings = {"d_model": d_model, "n_layers": n_layers, "n_heads": d_model // 64, "context_length": 4096}
    return ModelConfig.model_validate(settings | {"norm": "layernorm"} | changes)


def genesis(mode: str) -> ModelConfig:
    d_model, n_layers = GENESIS[mode]
    deep = mode != "microscope"
    return ModelConfig(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=d_model // 64,
        context_length=2048,
        norm="deepnorm" if deep else "rmsnorm",
        norm_position="post" if deep else "pre",
        final_norm="rmsnorm",
        positions="rope_interleaved",
        activation="swiglu",
        bias=False,
        dropout=0,
    )


@pytest.mark.parametrize(
    ("config", "vocab_size", "count"),
    [
        (fundamentallm("small"), 69, 413_184),
        (fundamentallm("small"), 100, 417_152),
        (fundamentallm("small").model_copy(update={"context_length": 256}), 69, 437_760),
        (fundamentallm("medium"), 69, 19_075_072),
        (fundamentallm("large"), 69, 85_483_008),
        (codelm("tiny"), 32_000, 112_777_728),
        (codelm("medium"), 32_000, 339_273_728),
        (codelm("large"), 32_000, 1_041_462_400),
        (codelm("xlarge"), 32_000, 1_452_792_320),
        (codelm("tiny", norm="rmsnorm", positions="rope"), 32_000, 109_612_800),
        (codelm("medium", norm="rmsnorm", positions="rope"), 32_000, 335_029_248),
        (codelm("large", norm="rmsnorm", positions="rope"), 32_000, 1_034_804_800),
        (codelm("xlarge", norm="rmsnorm", positions="rope"), 32_000, 1_445_321_472),
        (genesis("microscope"), 8192, 184_871_040),
        (genesis("deep_narrow_40"), 8192, 383_902_464),
        (genesis("deep_narrow_48"), 8192, 624_075_648),
    ],
)
def test_counts_equal_the_published_vectors(config: ModelConfig, vocab_size: int, count: int) -> None:
    assert parameter_count(config, vocab_size) == count


def test_deepnorm_blocks_have_four_norm_vectors_and_rmsnorm_blocks_two() -> None:
    shape = {"d_model": 64, "n_layers": 3, "n_heads": 4, "bias": False, "final_norm": "rmsnorm", "positions": "rope"}
    deep = parameter_count(ModelConfig.model_validate(shape | {"norm": "deepnorm", "norm_position": "post"}), 50)
    plain = parameter_count(ModelConfig.model_validate(shape | {"norm": "rmsnorm"}), 50)
    assert deep - plain == 3 * 2 * 64


def test_the_count_is_that_of_the_real_model() -> None:
    config = fundamentallm("small")
    model = build_model(config, 69)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config, 69)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameter_count(config, 69)


def test_untying_adds_exactly_the_head() -> None:
    tied = fundamentallm("small")
    assert parameter_count(tied.model_copy(update={"tie_embeddings": False}), 69) - 413_184 == 69 * 128


def test_counting_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    parameter_count(fundamentallm("large"), 69)
    assert torch.equal(before, torch.get_rng_state())
    build_model(fundamentallm("small"), 69)  # the control: building does draw
    assert not torch.equal(before, torch.get_rng_state())


def test_a_configured_vocabulary_wins_and_must_hold_the_tokenizers() -> None:
    config = fundamentallm("small").model_copy(update={"vocab_size": 80})
    assert parameter_count(config, 69) == 413_184 + 11 * 128
    with pytest.raises(ConfigError, match=r"model.vocab_size \(80\).*\(81\).*at least 81"):
        build_model(config, 81)
