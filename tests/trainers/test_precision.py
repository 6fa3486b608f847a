"""Devices, compute precision and the fp16 loss scale."""

from __future__ import annotations

import json

import pytest
import torch

from trainers.config import PrecisionConfig
from trainers.devices import check_precision, resolve_device
from trainers.errors import ConfigError, TrainingFailed, UserError
from trainers.precision import LossScaler, autocast

CPU = torch.device("cpu")
FINE, OVERFLOW = torch.tensor(False), torch.tensor(True)


@pytest.mark.parametrize("device", ["cpu", CPU])
def test_fp16_on_a_cpu_is_refused_with_reason_and_way_out(device: str | torch.device) -> None:
    with pytest.raises(ConfigError, match=r"30 times slower.*bf16"):
        check_precision(PrecisionConfig(compute="fp16"), device)
    check_precision(PrecisionConfig(compute="bf16"), device)
    check_precision(PrecisionConfig(compute="fp16"), "cuda")  # decided without a GPU here


def test_a_device_that_is_not_there_is_refused() -> None:
    assert resolve_device("cpu", 3) == CPU
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device=cuda"):
            resolve_device("cuda")
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="device=mps"):
            resolve_device("mps")


def test_bf16_computes_in_bf16_and_leaves_the_weights_in_fp32() -> None:
    layer = torch.nn.Linear(4, 4)
    with autocast(PrecisionConfig(compute="bf16"), CPU):
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16
    with autocast(PrecisionConfig(), CPU):
        assert layer(torch.randn(2, 4)).dtype == torch.float32
    assert layer.weight.dtype == torch.float32


def test_an_overflow_halves_the_scale_and_a_row_of_good_updates_doubles_it() -> None:
    scaler = LossScaler(CPU, scale=1024.0, growth_interval=3)
    for overflowed in (FINE, FINE, OVERFLOW, FINE, FINE):
        scaler.update(overflowed)
    assert scaler.state() == {"scale": 512.0, "good_updates": 2, "overflows": 1, "exhausted": False}
    scaler.update(FINE)
    assert scaler.state() == {"scale": 1024.0, "good_updates": 0, "overflows": 1, "exhausted": False}


def test_the_scale_moves_as_torchs_own_scaler_moves_it() -> None:
    ours, scale, growth = LossScaler(CPU, growth_interval=3), torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    for k in range(40):
        overflowed = torch.tensor(k % 7 == 3)
        ours.update(overflowed)
        torch._amp_update_scale_(scale, growth, overflowed.float(), 2.0, 0.5, 3)
        assert (ours.scale, ours.good_updates) == (scale, growth)


def test_scaling_and_unscaling_is_exact() -> None:
    scaler, gradient = LossScaler(CPU), torch.randn(100)
    scaled = [gradient * scaler.scale]
    scaler.unscale(scaled)
    assert torch.equal(scaled[0], gradient)


def test_the_state_goes_through_json_and_continues_alike() -> None:
    whole = LossScaler(CPU, growth_interval=3)
    for overflowed in (OVERFLOW, FINE, FINE):
        whole.update(overflowed)
    again, forgetful = LossScaler(CPU, growth_interval=3), LossScaler(CPU, growth_interval=3)
    again.load(json.loads(json.dumps(whole.state())))
    for scaler in (whole, again, forgetful):
        scaler.update(FINE)
    assert again.state() == whole.state()
    assert forgetful.state() != whole.state()


def test_a_scale_at_its_floor_is_a_clear_failure() -> None:
    scaler = LossScaler(CPU, scale=4.0)
    for _ in range(2):
        scaler.update(OVERFLOW)
        scaler.check()
    assert float(scaler.scale) == LossScaler.FLOOR
    scaler.update(OVERFLOW)
    with pytest.raises(TrainingFailed, match="bf16"):
        scaler.check()
