"""8-bit optimizers: bitsandbytes' own bits, what stays in 32, and exact continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainers import small_runs
from tests.trainers.crash import Plan, assert_same, attempt, finished
from tests.trainers.small_runs import config_for
from trainers.config import OptimConfig, PrecisionConfig
from trainers.config_io import override
from trainers.engine import TorchEngine
from trainers.optim import build_optimizer, parameter_groups, state_tensors

bnb = pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
INT8 = PrecisionConfig(optimizer_state="int8")
LARGE = 256 * 64  # values of a tensor that is quantised
RATIO = 0.27  # of the bytes of fp32 state, for tensors that are large


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 2))


def optimizer_of(model: nn.Module, precision: PrecisionConfig = INT8, **optim: Any) -> torch.optim.Optimizer:
    config = OptimConfig.model_validate({"lr": 1e-3, "weight_decay": 0.1, "decay": "all", **optim})
    return build_optimizer(parameter_groups(model, config), config, CPU, precision)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(6):
        optimizer.zero_grad()
        loss = (model(inputs) - 1.0).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def theirs(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer as a plain script would make it."""
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
    if name == "adamw":
        return bnb.optim.AdamW8bit(parameters, betas=(0.9, 0.999), **settings)
    if name == "paged adamw":
        return bnb.optim.PagedAdamW8bit(parameters, betas=(0.9, 0.999), **settings)
    if name == "lion":
        return bnb.optim.Lion8bit(parameters, betas=(0.9, 0.999), **settings)
    if name == "ademamix":
        return bnb.optim.AdEMAMix8bit(parameters, betas=(0.9, 0.999, 0.9999), alpha=5.0, **settings)
    return bnb.optim.SGD8bit(parameters, momentum=0.9, **settings)


@pytest.mark.parametrize("name", ["adamw", "paged adamw", "lion", "ademamix", "sgd"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_updates_have_the_bits_of_bitsandbytes_own_optimizer(name: str) -> None:
    ours, reference, other = build_model(), build_model(), build_model()
    mine = optimizer_of(ours, name=name.removeprefix("paged "), paged=name.startswith("paged"))
    losses = train(ours, mine)
    train(reference, theirs(name, list(reference.parameters())))
    train(other, optimizer_of(other, PrecisionConfig(), name="adamw" if "adamw" in name else "sgd"))
    assert losses[-1] < losses[0]
    for one, two in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(ours[0].weight, other[0].weight)  # 8 bits leave a trace


@pytest.mark.parametrize("name", ["adamw", "lion", "ademamix", "sgd"])
def test_large_tensors_keep_at_most_27_percent_of_the_bytes_of_fp32_state(name: str) -> None:
    model = build_model()
    bytes_of = {
        state: _state_bytes(model, optimizer_of(model, PrecisionConfig(optimizer_state=state), name=name))
        for state in ("int8", "fp32")
    }
    for parameter, in_32 in bytes_of["fp32"].items():
        quantised = bytes_of["int8"][parameter] <= RATIO * in_32
        assert quantised == (parameter == "0.weight")  # the small ones are the negative control


def _state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the moments and their scales by parameter, from the tensors."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = dict.fromkeys(names.values(), 0)
    for key, tensor in state_tensors(optimizer, names).items():
        kind, name = key.split("/")
        if kind != "step":
            found[name] += tensor.numel() * tensor.element_size()
    return found


@pytest.mark.parametrize(
    ("least", "quantised"), [(4096, {"0.weight"}), (LARGE + 1, set()), (512, {"0.weight", "2.weight"})]
)
def test_min_8bit_size_says_which_tensors_stay_in_32_bits(least: int, quantised: set[str]) -> None:
    model = build_model()
    optimizer = optimizer_of(model, min_8bit_size=least)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    small = {key.split("/")[1] for key, t in state_tensors(optimizer, names).items() if t.dtype == torch.uint8}
    assert small == quantised


def engine_of(model: nn.Module, **optim: Any) -> TorchEngine:
    return TorchEngine(
        model, optim=OptimConfig.model_validate({"lr": 1e-2, **optim}), precision=INT8, device=CPU,
        world_size=1, compile=False, deterministic=False,
    )  # fmt: skip


def advance(engine: TorchEngine, steps: range) -> None:
    for step in steps:
        with engine.micro_batch(last=True) as model:
            inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            engine.backward((model(inputs) - 1.0).square().mean())
        engine.update(1e-2)


@pytest.mark.parametrize("name", ["adamw", "lion", "ademamix", "sgd"])
@pytest.mark.parametrize("spoiled", [None, "state1", "absmax1", "step"])
def test_the_state_goes_through_named_tensors_and_continues_bit_for_bit(name: str, spoiled: str | None) -> None:
    whole = engine_of(build_model(), name=name)
    advance(whole, range(3))
    files = {stem: {key: t.clone() for key, t in tensors.items()} for stem, tensors in whole.tensors().items()}
    if spoiled is not None:
        for key in files["optimizer"]:
            if key.startswith(f"{spoiled}/"):
                files["optimizer"][key].zero_()
    again = engine_of(build_model(), name=name)
    again.load(files, whole.state(), optimizer=True)
    advance(whole, range(3, 6))
    advance(again, range(3, 6))
    same = all(torch.equal(t, again.tensors()["model"][key]) for key, t in whole.tensors()["model"].items())
    assert same == (spoiled is None or (spoiled, name) == ("step", "lion"))  # lion corrects nothing by its count


@pytest.mark.parametrize("precision", ["int8", "bf16 weights"])
def test_a_stopped_run_goes_on_bit_for_bit(precision: str, tmp_path: Path) -> None:
    words = {
        "int8": ["precision.weights=int8", "precision.optimizer_state=int8", "optim.min_8bit_size=256"],
        "bf16 weights": ["precision.compute=bf16", "precision.bf16_weights=true"],
    }
    config = override(config_for(small_runs.write_text(tmp_path)), words[precision])
    whole = finished(attempt(config, tmp_path / "whole"))
    attempt(config, tmp_path / "run", Plan(stop_at=5))
    attempt(config, tmp_path / "run", Plan(kill_at=8))
    assert_same(finished(attempt(config, tmp_path / "run")), whole)
    plain = finished(attempt(override(config, ["precision.weights=native", "precision.optimizer_state=fp32",
                                               "precision.bf16_weights=false"]), tmp_path / "plain"))  # fmt: skip
    with pytest.raises(AssertionError):
        assert_same(plain, whole)
