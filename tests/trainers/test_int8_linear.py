"""int8 linear layers: exact sums, small errors, gradients, and what is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainers.config import ModelConfig
from trainers.int8_linear import EXACT_TERMS, Int8Linear, int8_product, quantise_rows, use_int8
from trainers.models import build_model


@pytest.mark.parametrize(("rows", "terms", "columns"), [(1, 16, 8), (5, EXACT_TERMS, 24), (3, 2 * EXACT_TERMS + 8, 16)])
def test_the_product_is_that_of_the_int8_kernel_to_the_last_integer(rows: int, terms: int, columns: int) -> None:
    left, right = (torch.full((n, terms), 127, dtype=torch.int8) for n in (rows, columns))  # the largest sums
    left[0, ::5] = right[0, ::2] = 113  # and such as are no round numbers
    exact = torch._int_mm(left, right.t())
    assert torch.equal(int8_product(left, right), exact.float())


def test_pieces_are_needed_where_the_sum_is_longer_than_float32_holds() -> None:
    left = torch.full((1, 2 * EXACT_TERMS), 127, dtype=torch.int8)
    left[0, 0] = 126
    exact = int((left.long() * left.long()).sum())
    in_order = torch.zeros(())
    for code in left[0].float():
        in_order += code * code
    assert int(in_order) != exact
    assert int8_product(left, left).item() == torch.tensor(exact).float().item()


def test_codes_are_within_half_a_step_and_a_row_of_zeros_stays_zero() -> None:
    values = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    values[3] = 0
    codes, scale = quantise_rows(values)
    assert codes.abs().max() == 127 and codes[3].eq(0).all()
    assert ((codes * scale - values).abs() <= scale / 2 * (1 + 1e-6)).all()


def layers() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    reference, ours = nn.Linear(64, 48), nn.Sequential(nn.Linear(64, 48))
    ours[0].load_state_dict(reference.state_dict())
    use_int8(ours)
    return reference, ours[0]  # type: ignore[return-value]


def relative_error(got: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    assert got is not None and wanted is not None
    return float((got - wanted).norm() / wanted.norm())


def test_output_and_gradients_are_close_to_those_of_full_precision_but_not_equal() -> None:
    reference, ours = layers()
    inputs = torch.randn(2, 16, 64)
    direction = torch.randn(2, 16, 48)
    results = []
    for layer in (reference, ours):
        x = inputs.clone().requires_grad_()
        out = layer(x)
        out.backward(direction)
        results.append((out.detach(), x.grad, layer.weight.grad, layer.bias.grad))
    for place, (wanted, got) in enumerate(zip(*results, strict=True)):
        exact = place >= 2  # the weight's and the bias' gradients are not quantised
        error = relative_error(got, wanted)
        assert error < 1e-5 if exact else 1e-4 < error < 0.02


def test_the_result_of_a_row_does_not_depend_on_the_others() -> None:
    _, ours = layers()
    inputs = torch.randn(9, 64)
    with torch.no_grad():
        assert torch.equal(ours(inputs)[4:5], ours(inputs[4:5]))


def test_what_is_not_finite_stays_so() -> None:
    _, ours = layers()
    inputs = torch.ones(2, 64)
    inputs[0, 0], inputs[1, 0] = float("nan"), float("inf")
    assert not torch.isfinite(ours(inputs)).any()


def test_under_autocast_it_answers_in_the_compute_type() -> None:
    _, ours = layers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(torch.randn(4, 64))
    assert out.dtype == torch.bfloat16 and ours.weight.dtype == torch.float32


def test_the_linear_layers_of_the_blocks_are_turned_and_the_rest_is_not() -> None:
    config = ModelConfig(d_model=24, n_layers=2, n_heads=2, context_length=8, d_ff=36, tie_embeddings=False)
    model = build_model(config, 16)
    names = set(dict(model.named_parameters()))
    turned = use_int8(model)
    assert {name.split(".", 2)[2] for name in turned} == {"attention.qkv", "attention.out"}  # 36 is no multiple of 8
    assert {name for name, module in model.named_modules() if type(module) is Int8Linear} == set(turned)
    assert set(dict(model.named_parameters())) == names  # and checkpoints fit either
