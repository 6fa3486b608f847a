"""Virtual axes become ordinary overrides: precision, shape, the lengths of phases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.precisions import PRECISIONS, precision_of
from search_spaces.shapes import BAND, Shape, block_parameters, equal_shapes, parse_shape
from search_spaces.trial import assignments, phase_tokens, resolve, trial_config
from trainers.config import RunConfig
from trainers.config_io import check_path, override
from trainers.errors import ConfigError
from trainers.models import build_model
from trainers.presets import PRESETS, preset

SMALL = preset("fundamentallm/small")
TWO = preset("fundamentallm/two-phase")
SHARE = "phases.prose.budget.share"


def three_phases(steps: tuple[int, int, int], batch: int) -> RunConfig:
    phases = ", ".join(f"{{name: p{index}, budget: {{steps: {count}}}}}" for index, count in enumerate(steps))
    return override(SMALL, [f"phases=[{phases}]", "budget=null", f"batch.sequences={batch}"])


def tokens(config: RunConfig) -> list[int]:
    return [phase_tokens(phase, config) for phase in config.resolved_phases()]


def test_plain_paths_stay_as_they_are() -> None:
    params = {"optim.lr": 1e-3, "optim.betas": [0.9, 0.95], "schedule.kind": "wsd", "optim.clip_norm": None}
    assert resolve(params, SMALL) == params
    config = trial_config(params, SMALL)
    assert (config.optim.lr, config.optim.betas, config.schedule.kind) == (1e-3, (0.9, 0.95), "wsd")
    assert config.optim.clip_norm is None
    assert trial_config({}, SMALL) == SMALL


@pytest.mark.parametrize("value", [1e-05, 0.1 + 0.2, 1e-300, 123456789.0, 2.5e-4])
def test_a_number_reaches_the_configuration_to_the_bit(value: float) -> None:
    assert trial_config({"optim.lr": value}, SMALL).optim.lr == value


def test_assignments_are_overrides_of_the_command_line() -> None:
    params = {"optim.lr": 1e-05, "model.shape": "1x180", "precision": "bf16"}
    assert assignments(params, SMALL) == [
        "optim.lr=1e-05", "model.n_layers=1", "model.d_model=180", 'precision.compute="bf16"',
        'precision.weights="native"', 'precision.optimizer_state="fp32"', "precision.adapter_rank=0",
    ]  # fmt: skip


def test_every_resolved_path_is_a_field() -> None:
    params = {SHARE: 0.3, "precision": "bf16", "model.shape": "1x180", "phases.0.optim.lr": 1e-3}
    for path in resolve(params, TWO):
        check_path(TWO, path)
    with pytest.raises(ConfigError, match="unknown path"):
        check_path(TWO, "model.shape")


# ---- precision ------------------------------------------------------------------------------------------


def test_every_precision_is_known_and_some_can_be_had() -> None:
    assert list(PRECISIONS) == ["fp32", "bf16", "fp16", "int8", "int4"]
    for name in PRECISIONS:
        base = override(SMALL, ["init_from=base"]) if name == "int4" else SMALL
        config = trial_config({"precision": name}, base)
        assert precision_of(config) == name
    with pytest.raises(ConfigError, match="--init-from"):
        trial_config({"precision": "int4"}, SMALL)


def test_words_without_a_name_are_told_as_words() -> None:
    assert precision_of(override(SMALL, ["precision.optimizer_state=int8"])) == "fp32/native/int8"


# ---- shapes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fundamentallm/small", "fundamentallm/medium", "genesis/microscope", "codelm/tiny"])
def test_block_parameters_are_those_of_the_built_model(name: str) -> None:
    model = preset(name).model
    with torch.device("meta"):
        built = build_model(model, model.vocab_size or 69)
    embeddings = {id(parameter) for module in built.modules() if isinstance(module, torch.nn.Embedding)
                  for parameter in module.parameters()}  # fmt: skip
    matrices = [p for n, p in built.named_parameters() if p.dim() == 2 and id(p) not in embeddings and "head" not in n]
    own = Shape(model.n_layers, model.d_model)
    assert block_parameters(model, own) == sum(parameter.numel() for parameter in matrices)
    assert block_parameters(model, Shape(own.n_layers + 1, own.d_model)) != block_parameters(model, own)


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_keep_the_parameters_and_fit_the_heads(name: str) -> None:
    config = preset(name)
    own = Shape(config.model.n_layers, config.model.d_model)
    total = block_parameters(config.model, own)
    shapes = equal_shapes(config.model)
    assert own in shapes and len(shapes) >= 3
    for shape in shapes:
        model = trial_config({"model.shape": str(shape)}, config).model
        assert abs(block_parameters(model, shape) / total - 1) <= BAND
    deeper = Shape(2 * own.n_layers, own.d_model)
    assert block_parameters(config.model, deeper) / total - 1 > BAND  # the negative control


def test_the_feed_forward_ratio_is_kept() -> None:
    config = override(SMALL, ["model.d_ff=256"])
    assert trial_config({"model.shape": "4x64"}, config).model.d_ff == 128
    assert trial_config({"model.shape": "4x64"}, SMALL).model.d_ff is None


def test_shapes_are_spelled_one_way() -> None:
    assert parse_shape("12x768") == Shape(12, 768)
    assert str(Shape(12, 768)) == "12x768"
    assert [parse_shape(text) for text in ("0x768", "12X768", "12x", "x", " 1x2", 3, None)] == [None] * 7


# ---- the lengths of phases ------------------------------------------------------------------------------


def test_a_share_moves_tokens_between_phases() -> None:
    config = trial_config({SHARE: 0.25}, TWO)
    assert tokens(config) == [400 * TWO.tokens_per_step, 1200 * TWO.tokens_per_step]
    assert sum(tokens(config)) == sum(tokens(TWO))
    assert config.budget is None


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(*[st.integers(20, 300)] * 3),
    st.integers(1, 9),
    st.floats(0.1, 0.8),
    st.none() | st.floats(0.1, 0.8),
)
def test_the_total_stays_equal(steps: tuple[int, int, int], batch: int, first: float, second: float | None) -> None:
    base = three_phases(steps, batch)
    params = {"phases.p0.budget.share": first} | ({} if second is None else {"phases.1.budget.share": second})
    trial = trial_config(params, base)
    assert sum(tokens(trial)) == sum(tokens(base))
    assert all(count > 0 and count % base.tokens_per_step == 0 for count in tokens(trial))
    assert tokens(trial)[0] == round(sum(steps) * first) * base.tokens_per_step
    if second is None:  # the others keep their ratio, to a step
        rest = sum(tokens(base)[1:])
        expected = (sum(tokens(base)) - tokens(trial)[0]) * tokens(base)[1] / rest
        assert abs(tokens(trial)[1] - expected) <= base.tokens_per_step


def test_the_total_stays_equal_whatever_the_batch() -> None:
    """The control: in steps, another batch is another number of tokens; shares are counted in tokens."""
    assert sum(tokens(trial_config({SHARE: 0.3, "batch.sequences": 32}, TWO))) == sum(tokens(TWO))
    assert sum(tokens(trial_config({"batch.sequences": 32}, TWO))) == 4 * sum(tokens(TWO))


@pytest.mark.parametrize(
    ("params", "config", "said"),
    [
        ({SHARE: 0.0}, TWO, "between 0 and 1"),
        ({SHARE: 1}, TWO, "between 0 and 1"),
        ({SHARE: "half"}, TWO, "between 0 and 1"),
        ({SHARE: 1e-6}, TWO, "at least one step"),
        ({SHARE: 1 - 1e-6}, TWO, "at least one step"),
        ({"phases.code.budget.share": 0.5}, TWO, "the last phase"),
        ({"phases.other.budget.share": 0.5}, TWO, "the phases here are prose, code"),
        ({SHARE: 0.5}, SMALL, "a single phase"),
        ({SHARE: 0.5}, override(TWO, ["phases.code.budget.epochs=1"]), "set phases.code.budget.steps"),
        ({"model.shape": "wide"}, SMALL, "LAYERSxWIDTH"),
        ({"precision": "fp8"}, SMALL, "must be one of fp32"),
        ({"precision": 16}, SMALL, "must be one of fp32"),
    ],
)
def test_a_virtual_value_that_means_nothing_is_refused(params: dict, config: RunConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(params, config)
