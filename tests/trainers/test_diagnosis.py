"""What a message about a value that is not finite says: the layer, the weight or the gradient where it began."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from trainers.diagnosis import diagnose


class Cube(nn.Module):
    """Sound forward, infinite derivative at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), nn.Dropout(0.5))


def losses(net: nn.Module, *inputs: Tensor) -> list[Callable[[], Tensor]]:
    return [partial(lambda x: net(x).sum(), x) for x in inputs]


GOOD = torch.ones(2, 4)


def test_the_innermost_module_is_named_with_its_micro_batch() -> None:
    net = model()
    net[1][1].register_forward_hook(lambda module, inputs, output: output * torch.where(inputs[0] > 0.99, torch.nan, 1))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.fill_(-4.0)
    place, said = diagnose(net, losses(net, GOOD, GOOD * 100))
    assert place == 1 and "not finite is that of 1.1 " in said and "396, is of 0)" in said


def test_a_weight_comes_first() -> None:
    net = model()
    with torch.no_grad():
        net[1][1].bias[2] = torch.inf
    assert diagnose(net, losses(net, GOOD)) == (None, "the weight 1.1.bias is not finite")


def test_a_gradient_under_a_finite_loss_is_named() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), Cube())
    place, said = diagnose(net, losses(net, GOOD, GOOD * 0))
    assert place == 1 and said.startswith("the gradient of 0.weight is not finite")


def test_sound_batches_accuse_nobody_and_nothing_is_changed() -> None:
    net = model()
    before, state = torch.get_rng_state(), {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert diagnose(net, losses(net, GOOD, GOOD)) == (None, "run once more, every output and gradient is finite")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_alone_can_be_at_fault(value: float) -> None:
    net = model()
    place, said = diagnose(net, [lambda: net(GOOD).sum() * value])
    assert place == 0 and "the loss is not" in said
