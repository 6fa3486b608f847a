"""The catalog on every preset and device: each space passes its own check, and is centred on the preset."""

from __future__ import annotations

from random import Random
from typing import get_args

import pytest

from search_spaces.catalog import CATALOG, CatalogSpace, catalog_lines, catalogued
from search_spaces.check import check
from search_spaces.precisions import Device, precision_of
from search_spaces.space import Axis, Choice, Float, Space
from search_spaces.trial import PRECISION, SHAPE, phase_tokens, trial_config
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.errors import ConfigError
from trainers.presets import PRESETS, preset

DEVICES: tuple[Device, ...] = get_args(Device)
# which presets cannot take a space: a mixture, several phases
REFUSED = {"task_weights": set(PRESETS), "phase_lengths": set(PRESETS) - {"fundamentallm/two-phase"}}
MIXTURE = override(
    preset("fundamentallm/small"),
    ["data.sources=[{corpus: a, weight: 3}, {corpus: b, weight: 1}, {corpus: c, weight: 0.5}]"],
)


def space_of(name: str, config: RunConfig, device: Device = "cpu") -> CatalogSpace | None:
    try:
        return catalogued(name, config, device)
    except ConfigError as error:
        assert str(error).startswith(f"{name}: ")
        return None


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("space_name", CATALOG)
def test_a_catalogued_space_passes_its_own_check(space_name: str, name: str) -> None:
    config = preset(name)
    for device in DEVICES:
        found = space_of(space_name, config, device)
        assert (found is None) == (name in REFUSED.get(space_name, set()))
        if found is not None:
            check(found.space, config, device)
            assert Space.from_json(found.space.to_json()) == found.space
            trial_config(found.space.sample(Random(0)), config)


@pytest.mark.parametrize("name", PRESETS)
def test_what_was_taken_out_is_refused_when_a_user_puts_it_back(name: str) -> None:
    """The negative control of the check above."""
    config = preset(name)
    for device in DEVICES:
        found = catalogued("lr_batch_precision", config, device)
        gone = {cell.cell.removeprefix("precision="): cell.reason for cell in found.taken_out if "prec" in cell.cell}
        kept = found.space[PRECISION]
        assert isinstance(kept, Choice)
        assert set(gone) | set(kept.options) == {"fp32", "bf16", "fp16", "int8", "int4"}
        assert ("fp16" in gone) == (device == "cpu")
        assert ("int8" in gone) == (device == "mps") and "--init-from" in gone["int4"]
        for cell, reason in gone.items():
            back = found.space.with_axis(Axis(PRECISION, Choice((*kept.options, cell))))
            with pytest.raises(ConfigError) as caught:
                check(back, config, device)
            assert reason in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("space_name", CATALOG)
def test_a_space_is_centred_on_the_preset(space_name: str, name: str) -> None:
    config = preset(name)
    found = space_of(space_name, config)
    if found is None:
        return
    own: dict[str, object] = {PRECISION: precision_of(config), "batch.sequences": config.sequences_per_step,
                              SHAPE: f"{config.model.n_layers}x{config.model.d_model}"}  # fmt: skip
    budgets = [phase_tokens(phase, config) for phase in config.resolved_phases() if phase.budget.epochs is None]
    for axis in found.space.axes:
        if axis.path.endswith(".share"):
            assert axis.domain.contains(budgets[0] / sum(budgets))
        else:
            assert axis.domain.contains(own[axis.path] if axis.path in own else value_at(config, axis.path)), axis


def value_at(config: RunConfig, path: str) -> object:
    value: object = config
    for key in path.split("."):
        if isinstance(value, tuple):
            value = next(
                phase for index, phase in enumerate(value) if key in (str(index), getattr(phase, "name", None))
            )
        else:
            value = getattr(value, key)
    return value


@pytest.mark.parametrize("name", PRESETS)
def test_the_rate_spans_two_decades_and_the_batch_four_times_up_and_down(name: str) -> None:
    config = preset(name)
    space = catalogued("lr_batch", config, "cpu").space
    rate, batch = space["optim.lr"], space["batch.sequences"]
    assert isinstance(rate, Float) and isinstance(batch, Choice)
    assert rate.log and rate.high / rate.low == pytest.approx(100)
    assert rate.grid(3)[1] == pytest.approx(config.optim.lr)
    own = config.sequences_per_step
    assert {own, 2 * own, 4 * own} <= set(batch.options)
    assert set(batch.options) <= {own // 4, own // 2, own, 2 * own, 4 * own}


def test_a_batch_that_the_micro_batch_does_not_divide_is_taken_out() -> None:
    config = override(preset("fundamentallm/small"), ["batch.micro_sequences=4"])
    found = catalogued("lr_batch", config, "cpu")
    assert found.space["batch.sequences"] == Choice((4, 8, 16, 32))
    assert [cell.cell for cell in found.taken_out] == ["batch.sequences=2"]
    check(found.space, config, "cpu")
    assert catalogued("lr_batch", preset("fundamentallm/small"), "cpu").taken_out == ()


def test_a_mixture_takes_its_weights() -> None:
    found = catalogued("task_weights", MIXTURE, "cpu")
    assert found.space.describe() == {
        "data.sources.1.weight": "log 0.25 .. 4.0",
        "data.sources.2.weight": "log 0.125 .. 2.0",
    }
    check(found.space, MIXTURE, "cpu")


def test_each_phase_is_searched_by_its_own_settings() -> None:
    two = preset("fundamentallm/two-phase")
    assert list(catalogued("lr", two, "cpu").space) == ["optim.lr", "phases.code.optim.lr"]
    kinds = [path for path in catalogued("schedule", two, "cpu").space if path.endswith("kind")]
    assert kinds == ["phases.prose.schedule.kind", "phases.code.schedule.kind"]


def test_phases_too_short_to_share_are_refused() -> None:
    short = override(preset("fundamentallm/two-phase"), ["phases.prose.budget.steps=1", "phases.code.budget.steps=1"])
    with pytest.raises(ConfigError, match="at least one step"):
        catalogued("phase_lengths", short, "cpu")
    epochs = override(preset("fundamentallm/two-phase"), ["phases.code.budget.epochs=1"])
    with pytest.raises(ConfigError, match=r"phase_lengths: phases\.code\.budget\.epochs"):
        catalogued("phase_lengths", epochs, "cpu")


def test_initial_weights_fix_the_shape() -> None:
    with pytest.raises(ConfigError, match="init_from"):
        catalogued("depth_width", override(preset("fundamentallm/small"), ["init_from=base"]), "cpu")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no search space 'lr_batc'\. Did you mean lr_batch\? Spaces: lr, lr_batch,"):
        catalogued("lr_batc", preset("fundamentallm/small"), "cpu")


def test_the_table_says_what_and_for_whom() -> None:
    lines = {line.name: line for line in catalog_lines()}
    assert list(lines) == list(CATALOG)
    assert lines["lr"].suits == "every preset"
    assert lines["phase_lengths"].suits == "fundamentallm/two-phase"
    assert lines["task_weights"].suits.startswith("none of the presets")
    assert all(line.searches.endswith(".") and len(line.searches) < 120 for line in lines.values())
