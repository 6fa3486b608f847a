"""The presets: their parameter counts, recipes and names."""

from __future__ import annotations

import pytest

from trainers.config import ModelConfig, RunConfig
from trainers.config_io import build_config, dump_yaml, load_yaml, override
from trainers.errors import ConfigError
from trainers.presets import PRESETS, description, preset

CHARACTERS = 69  # Shakespeare's 65 and four specials


def closed_form(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of each system in closed form, written anew from the shape alone."""
    d, f, layers = model.d_model, model.ffn_width, model.n_layers
    norm = d if model.norm == "rmsnorm" else 2 * d
    final_norm = d if "rmsnorm" in (model.norm, model.final_norm) else 2 * d
    attention = 4 * (d * d + (d if model.bias else 0))
    feed_forward = 3 * d * f if model.activation == "swiglu" else 2 * d * f + (f + d if model.bias else 0)
    positions = model.context_length * d if model.positions == "learned" else 0
    return vocab_size * d + positions + layers * (attention + feed_forward + 2 * norm) + final_norm


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("fundamentallm/small", [], 413_184),
        ("fundamentallm/medium", [], 19_075_072),
        ("fundamentallm/large", [], 85_483_008),
        ("codelm/tiny", [], 112_777_728),
        ("codelm/medium", [], 339_273_728),
        ("codelm/large", [], 1_041_462_400),
        ("codelm/xlarge", [], 1_452_792_320),
        ("codelm/tiny", ["model.norm=rmsnorm", "model.positions=rope"], 109_612_800),
        ("codelm/medium", ["model.norm=rmsnorm", "model.positions=rope"], 335_029_248),
        ("codelm/large", ["model.norm=rmsnorm", "model.positions=rope"], 1_034_804_800),
        ("codelm/xlarge", ["model.norm=rmsnorm", "model.positions=rope"], 1_445_321_472),
        ("genesis/microscope", [], 184_871_040),
        ("genesis/deep_narrow_40", [], 383_902_464),
        ("genesis/deep_narrow_48", [], 624_075_648),
    ],
)
def test_the_shape_has_the_known_parameter_count(name: str, changes: list[str], count: int) -> None:
    model = override(preset(name), changes).model
    assert closed_form(model, model.vocab_size or CHARACTERS) == count
    wider = model.model_copy(update={"d_model": model.d_model + model.n_heads})
    assert closed_form(wider, model.vocab_size or CHARACTERS) != count


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_round_trips_through_yaml(name: str) -> None:
    config = preset(name)
    text = dump_yaml(config, header=f"{name}\nsecond line")
    assert build_config(load_yaml(text)) == config
    assert text.startswith(f"# {name}\n# second line\n")
    assert build_config(load_yaml(text.replace(f"seed: {config.seed}", "seed: 43"))) != config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_labelled_described_and_valid(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    assert RunConfig.model_validate(config.model_dump()) == config
    assert 20 < len(description(name)) < 110
    assert description(name).endswith((".", ":"))


def test_names_and_descriptions_are_distinct() -> None:
    assert len({description(name) for name in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize("asked", ["small", "fundamentallm/smal", "fundamentalm/small"])
def test_an_unknown_preset_is_refused_with_the_nearest(asked: str) -> None:
    with pytest.raises(ConfigError, match="Did you mean fundamentallm/small"):
        preset(asked)
    with pytest.raises(ConfigError, match=r"there is no preset 'zzz'\. Presets"):
        preset("zzz")


def test_small_is_the_small_recipe() -> None:
    config = preset("fundamentallm/small")
    assert (config.budget and config.budget.epochs, config.batch.sequences, config.sequence_length) == (2, 8, 64)
    assert (config.optim.lr, config.schedule.kind, config.schedule.min_lr_ratio) == (1e-3, "cosine", 0.1)
    assert (config.checkpoint.keep_last_n, config.checkpoint.save_best, config.seed) == (3, True, 42)


@pytest.mark.parametrize(
    ("size", "rows", "steps", "lr", "warmup"),
    [("tiny", 4, 1500, 6e-5, 100), ("medium", 2, 3000, 5e-5, 200), ("large", 4, 3000, 3e-5, 300),
     ("xlarge", 2, 3000, 2e-5, 400)],
)  # fmt: skip
def test_codelm_follows_its_table(size: str, rows: int, steps: int, lr: float, warmup: int) -> None:
    config = preset(f"codelm/{size}")
    assert (config.sequences_per_step, config.budget and config.budget.steps) == (rows, steps)
    assert (config.optim.lr, config.schedule.warmup_steps, config.schedule.kind) == (lr, warmup, "constant")
    assert (config.model.vocab_size, config.model.context_length, config.sequence_length) == (32_000, 4096, 1024)
    assert config.model.d_model // config.model.n_heads == 64


def test_genesis_sums_four_micro_batches_of_four() -> None:
    config = preset("genesis/deep_narrow_40")
    assert (config.sequences_per_step, config.micro_sequences, config.accumulation) == (16, 4, 4)
    assert (config.model.norm, config.model.norm_position, config.model.final_norm) == ("deepnorm", "post", "rmsnorm")


def test_the_two_phases_differ_in_text_and_rate() -> None:
    prose, code = preset("fundamentallm/two-phase").resolved_phases()
    assert [phase.data.sources[0].corpus for phase in (prose, code)] == ["python-stdlib/prose", "python-stdlib/code"]
    assert prose.optim.lr != code.optim.lr
    assert (prose.model, code.hand_over) == (code.model, "weights")
