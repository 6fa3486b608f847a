"""4-bit bases and adapters: what is frozen, what is saved, what goes on, and the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.trainers import small_runs
from tests.trainers.crash import Plan, assert_same, attempt, finished
from tests.trainers.small_runs import STEPS, config_for
from trainers.adapters import MARK, adapt, adapted_layers, kept_parameters, merged_weights
from trainers.base_weights import FOLDER
from trainers.config import ModelConfig, PrecisionConfig, RunConfig
from trainers.config_io import build_config, override
from trainers.context import LocalContext
from trainers.errors import CheckpointError, ConfigError
from trainers.initial import initial_checkpoint, initial_hash
from trainers.loop import train
from trainers.manifest import newest
from trainers.models import build_model
from trainers.nf4 import Nf4Linear
from trainers.weights import load_weights, open_weights

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

INT4 = ["precision.weights=nf4", "precision.adapter_rank=4"]
LORA = ["precision.adapter_rank=4"]
MODEL = ModelConfig(d_model=32, n_layers=2, n_heads=2, context_length=16, dropout=0.0, tie_embeddings=False)


def built(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(MODEL, 16)


def adapted(weights: str = "nf4") -> nn.Module:
    model = built()
    adapt(model, PrecisionConfig.model_validate({"weights": weights, "adapter_rank": 4}))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(16).repeat(2, 1)
    out: torch.Tensor = model(tokens)[0]
    return out


# ---- the layer ------------------------------------------------------------------------------------------


def test_a_4_bit_layer_computes_with_what_it_gives_back() -> None:
    source = nn.Linear(64, 48)
    layer = Nf4Linear(source)
    weight = layer.dequantised()
    relative = (weight - source.weight).norm() / source.weight.norm()
    assert 0.02 < relative < 0.12  # 16 levels
    inputs = torch.randn(3, 5, 64, requires_grad=True)
    out = layer(inputs)
    torch.testing.assert_close(out, F.linear(inputs, weight, source.bias))
    direction = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, inputs, direction)
    torch.testing.assert_close(gradient, direction @ weight)
    assert not torch.allclose(out, source(inputs))


def test_it_takes_little_more_than_half_a_byte_a_value() -> None:
    layer = Nf4Linear(nn.Linear(1024, 512, bias=False))
    held = [layer.weight, *layer.scales().values()]
    assert sum(t.numel() * t.element_size() for t in held) <= 0.52 * 1024 * 512


def test_evaluating_changes_nothing_that_training_uses() -> None:
    """bitsandbytes' own layer repacks its weights at the first evaluation on CPUs with AVX512-BF16."""
    model = adapted()
    before = logits(model.train())
    with torch.no_grad():
        logits(model.eval())
    assert torch.equal(logits(model.train()), before)


# ---- the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["nf4", "native"])
def test_adapters_change_nothing_at_first_and_are_all_that_is_trained(weights: str) -> None:
    model = adapted(weights)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in kept_parameters(model)} and all(MARK in name for name in trained)
    assert len(trained) == 2 * len(list(adapted_layers(model))) == 2 * 4 * MODEL.n_layers
    same = torch.equal(logits(model), logits(built()))
    assert same == (weights == "native")  # quantising does change it
    assert len(kept_parameters(built())) == len(list(built().parameters()))


@pytest.mark.parametrize("weights", ["nf4", "native"])
def test_the_merged_model_is_the_adapted_one(weights: str) -> None:
    model = adapted(weights)
    with torch.no_grad():
        for _, parameter in kept_parameters(model):
            parameter.normal_(0.0, 0.2)
    merged = built(seed=1)
    merged.load_state_dict(merged_weights(model))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(merged), logits(built()), rtol=1e-2, atol=1e-2)


# ---- runs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in full precision."""
    folder = tmp_path_factory.mktemp("base")
    finished(attempt(config_for(small_runs.write_text(folder)), folder / "run"))
    return folder / "run"


def from_base(base: Path, words: list[str]) -> RunConfig:
    config = config_for(base.parent / "small.txt", optim={"lr": 3e-2})
    return override(config, [f"init_from={base}", *words])


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("int4") / "run"
    return folder, finished(attempt(from_base(base, INT4), folder))


def losses(ending: Any, name: str = "train/loss") -> list[float]:
    return [row[name] for row in ending.rows if name in row]


def test_a_run_over_a_4_bit_base_learns_and_saves_adapters_alone(base: Path, whole: tuple[Path, Any]) -> None:
    folder, ending = whole
    values = losses(ending, "val/loss")
    assert values[-1] < values[0]
    checkpoint = newest(folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == STEPS
    assert all(MARK in name for name in checkpoint.load("model"))
    assert all(MARK in name for name in checkpoint.load("optimizer"))
    source = initial_checkpoint(base)
    own = newest(folder / FOLDER)
    assert own is not None and own.manifest == source.manifest  # the frozen weights, as they were
    assert checkpoint.meta["base"]["step"] == source.step


@pytest.mark.parametrize("plan", [pytest.param(Plan(stop_at=5), marks=pytest.mark.slow), Plan(kill_at=8)])
def test_it_goes_on_bit_for_bit_without_the_run_it_came_from(
    base: Path, whole: tuple[Path, Any], tmp_path: Path, plan: Plan
) -> None:
    source = tmp_path / "source"
    shutil.copytree(base, source)
    config = override(from_base(base, INT4), [f"init_from={source}"])
    (tmp_path / "run").mkdir()
    # as the commands write it
    identity = {"fingerprint": "0", "fields": {"init_from": "its hash"}, "init_from": str(source)}
    (tmp_path / "run" / "identity.json").write_text(json.dumps(identity))
    attempt(config, tmp_path / "run", plan)
    shutil.rmtree(source)
    ending = attempt(config, tmp_path / "run")
    assert_same(finished(ending), whole[1])


def test_it_does_not_go_on_over_another_base(base: Path, tmp_path: Path) -> None:
    config = from_base(base, INT4)
    attempt(config, tmp_path / "run", Plan(stop_at=5))
    shutil.rmtree(tmp_path / "run" / FOLDER)
    other = tmp_path / "other"
    finished(attempt(override(config_for(base.parent / "small.txt"), ["seed=7"]), other))
    context = LocalContext(tmp_path / "run")
    with pytest.raises(CheckpointError, match="over other weights"):
        train(override(config, [f"init_from={other}"]), context)
    context.close()


def test_its_weights_open_with_and_without_quantisation(base: Path, whole: tuple[Path, Any]) -> None:
    folder, _ = whole
    checkpoint = newest(folder / "checkpoints")
    assert checkpoint is not None
    config = from_base(base, INT4)

    def opened(precision: PrecisionConfig) -> torch.Tensor:
        model = build_model(config.model, checkpoint.meta["vocab_size"])
        open_weights(model, checkpoint, precision, folder)
        return model.eval()(torch.arange(8)[None])[0]  # type: ignore[no-any-return]

    as_trained, unquantised = opened(config.precision), opened(PrecisionConfig(adapter_rank=4))
    bare = build_model(config.model, checkpoint.meta["vocab_size"])
    load_weights(bare, initial_checkpoint(base))
    without = bare.eval()(torch.arange(8)[None])[0]
    assert 0 < (as_trained - unquantised).norm() < (as_trained - without).norm()


def test_adapters_alone_are_no_start_for_another_run(base: Path, whole: tuple[Path, Any]) -> None:
    folder, _ = whole
    with pytest.raises(ConfigError, match="orchestrate merge"):
        initial_hash(override(config_for(base.parent / "small.txt"), [f"init_from={folder}"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": {"weights": "nf4", "adapter_rank": 8}}, "needs --init-from RUN"),
        ({"precision": {"adapter_rank": 8}}, "give the run they come from"),
        ({"precision": {"weights": "nf4"}, "init_from": "x"}, "nothing to train without adapters"),
        ({"precision": {"weights": "int8", "adapter_rank": 8}, "init_from": "x"}, "which adapters freeze"),
        ({"precision": {"bf16_weights": True}}, "needs precision.compute=bf16"),
        ({"precision": {"compute": "bf16", "bf16_weights": True, "weights": "int8"}}, "master weights of fp32"),
        ({"precision": {"compute": "bf16", "bf16_weights": True}, "optim": {"name": "sgd"}}, "lose small updates"),
        ({"precision": {"optimizer_state": "int8"}, "optim": {"name": "adam"}}, "as adamw does"),
        ({"precision": {"optimizer_state": "int8"}, "optim": {"name": "rmsprop"}}, "keeps no momentum"),
        ({"precision": {"optimizer_state": "int8"}, "optim": {"name": "sgd", "momentum": 0}}, "no state to keep"),
        ({"optim": {"paged": True}}, "pages the 8-bit state"),
        ({"precision": {"tf32": True}, "device": "cpu"}, "CUDA GPUs"),
    ],
)
def test_what_does_not_go_together_is_one_sentence_before_anything_starts(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build_config(changes)
    assert len(str(caught.value).splitlines()) == 1
