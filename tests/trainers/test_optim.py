"""Weight-decay groups and optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainers.config import OptimConfig, PrecisionConfig
from trainers.optim import build_optimizer, parameter_groups

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Parameter(torch.randn(3, 4))  # two dimensions, but no Linear
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def decayed(model: nn.Module, decay: str) -> set[str]:
    groups = parameter_groups(model, OptimConfig(decay=decay, weight_decay=0.1))  # type: ignore[arg-type]
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())  # each in one group
    return {name for group in groups if group["weight_decay"] == 0.1 for name, _ in group["params"]}


def test_linear_decays_weights_of_linear_layers_only() -> None:
    assert decayed(Model(tied=False), "linear") == {"hidden.weight", "head.weight"}


def test_a_matrix_tied_to_the_embedding_counts_as_embedding() -> None:
    assert decayed(Model(tied=True), "linear") == {"hidden.weight"}


def test_matrices_decays_everything_of_two_dimensions() -> None:
    assert decayed(Model(tied=False), "matrices") == {"embedding.weight", "table", "hidden.weight", "head.weight"}


def test_all_decays_all() -> None:
    model = Model(tied=False)
    assert decayed(model, "all") == {name for name, _ in model.named_parameters()}


def test_a_frozen_parameter_is_in_no_group() -> None:
    model = Model(tied=False)
    model.hidden.weight.requires_grad_(False)
    names = [name for group in parameter_groups(model, OptimConfig()) for name, _ in group["params"]]
    assert "hidden.weight" not in names and "hidden.bias" in names


def plain(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer as a plain script would make it."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.1, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-2, weight_decay=0.1, momentum=0.9, fused=True)
    return torch.optim.RMSprop(parameters, lr=1e-2, weight_decay=0.1, momentum=0.9, alpha=0.9)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop"])
def test_updates_have_the_bits_of_torchs_own_optimizer(name: str) -> None:
    ours, theirs = [build_model(), build_model()]
    settings: dict[str, Any] = {"name": name, "lr": 1e-2, "weight_decay": 0.1, "decay": "all"}
    config = OptimConfig.model_validate(settings)
    mine, reference = (
        build_optimizer(parameter_groups(ours, config), config, CPU, PrecisionConfig()),
        plain(name, list(theirs.parameters())),
    )
    for step in range(5):
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    kept, expected = mine.state[next(ours.parameters())], reference.state[next(theirs.parameters())]
    assert kept.keys() == expected.keys()  # the state made in advance is the state torch makes


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    return model(inputs).square().sum()


def test_fused_kernels_are_used_where_torch_has_them() -> None:
    for name, fused in (("adamw", True), ("adam", True), ("sgd", True), ("rmsprop", None)):
        config = OptimConfig(name=name)  # type: ignore[arg-type]
        optimizer = build_optimizer(parameter_groups(build_model(), config), config, CPU, PrecisionConfig())
        assert optimizer.param_groups[0].get("fused") == fused
