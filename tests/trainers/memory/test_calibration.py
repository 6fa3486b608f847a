"""What a device adds is learnt from measurements and kept in a file that may be lost."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.memory.calibration import FILE, MIB, USUAL, Sample, calibration_of, card_key, device_key, keep, refine

GIB = 1 << 30
MEASURED = [
    Sample("a", 1 * GIB, 1 * GIB + USUAL["cpu"].process_bytes + 50),
    Sample("b", 2 * GIB, 2 * GIB + USUAL["cpu"].process_bytes + 70, flops_per_s=3e9, speed_of="fp32"),
    Sample("c", 3 * GIB, 3 * GIB + USUAL["cpu"].process_bytes + 60, flops_per_s=5e9, speed_of="fp32"),
]


def test_the_constant_is_the_median_of_what_the_tensors_leave(tmp_path: Path) -> None:
    usual = calibration_of("cpu", tmp_path)
    assert usual == USUAL["cpu"]
    two = refine("cpu", tmp_path, MEASURED[:2])
    assert two.constant_bytes == usual.constant_bytes  # two samples are too few
    assert not two.measured_on and len(two.samples) == 2  # and the plan still says that it is what is usual
    three = refine("cpu", tmp_path, MEASURED[2:])
    assert three.constant_bytes == 60 and three.measured_on
    assert three.total(5 * GIB) == 5 * GIB + usual.process_bytes + 60
    assert calibration_of("cpu", tmp_path) == three
    assert three.speed("fp32") == pytest.approx(4e9) and three.speed("bf16") is None


def test_a_lighter_process_teaches_the_same_constant(tmp_path: Path) -> None:
    """`bench` measures without Ray: what its process took before the model is its own."""
    usual = USUAL["cpu"].process_bytes
    light = usual - 100 * MIB
    bare = [Sample(s.what, s.tensor_bytes, s.measured_bytes - 100 * MIB, process_bytes=light) for s in MEASURED]
    known = refine("cpu", tmp_path, bare)
    assert known.constant_bytes == 60 and known.process_bytes == usual
    unsaid = [replace(sample, process_bytes=None) for sample in bare]
    assert refine("cpu", tmp_path / "unsaid", unsaid).constant_bytes == 0  # as a plan for a worker it would be too low


def test_a_speed_alone_teaches_nothing_of_memory(tmp_path: Path) -> None:
    """A compiled run's memory is the compiler's too; its speed counts."""
    speeds = [Sample(f"{rate}", GIB, None, flops_per_s=rate, speed_of="fp32 compiled") for rate in (1e9, 3e9, 2e9)]
    known = refine("cpu", tmp_path, speeds)
    assert known.speed("fp32 compiled") == 2e9 and known.speed("fp32") is None
    assert known.constant_bytes == USUAL["cpu"].constant_bytes and not known.measured_on
    assert refine("cpu", tmp_path, MEASURED).constant_bytes == 60  # their median, with the speeds between them
    assert calibration_of("cpu", tmp_path).speed("fp32 compiled") == 2e9
    counted = [Sample(each.what, each.tensor_bytes, 9 * GIB, each.flops_per_s, each.speed_of) for each in speeds]
    assert refine("cpu", tmp_path, counted).constant_bytes > GIB  # what they would have taught


def test_devices_do_not_mix_and_a_torn_file_is_none(tmp_path: Path) -> None:
    refine("NVIDIA H200", tmp_path, MEASURED)
    assert calibration_of("cpu", tmp_path) == USUAL["cpu"]
    assert calibration_of("NVIDIA H200", tmp_path).samples == tuple(MEASURED)
    assert calibration_of("NVIDIA A100", tmp_path).constant_bytes == USUAL["cuda"].constant_bytes
    (tmp_path / FILE).write_text("{")
    assert calibration_of("NVIDIA H200", tmp_path).samples == ()
    keep(USUAL["cpu"], tmp_path)
    assert calibration_of("cpu", tmp_path) == USUAL["cpu"]


@pytest.mark.parametrize(
    "stored",
    [
        {"cpu": 5},
        {"cpu": {"device": "cpu"}},
        {"cpu": {**asdict(USUAL["cpu"]), "constant_bytes": "much"}},
        {"cpu": {**asdict(USUAL["cpu"]), "samples": [{"what": "a"}]}},
        {"cpu": {**asdict(USUAL["cpu"]), "samples": [7]}},
        ["cpu"],
    ],
)
def test_a_damaged_file_is_none_and_is_mended_by_the_next_measurement(stored: Any, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(stored))
    assert calibration_of("cpu", tmp_path) == USUAL["cpu"]
    assert refine("cpu", tmp_path, MEASURED).constant_bytes == 60
    assert calibration_of("cpu", tmp_path).samples == tuple(MEASURED)


def test_what_a_file_says_beyond_what_is_known_is_left_aside(tmp_path: Path) -> None:
    known = refine("cpu", tmp_path, MEASURED)
    stored = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({"cpu": {**stored["cpu"], "of a later version": 1}}))
    assert calibration_of("cpu", tmp_path) == known


@pytest.mark.parametrize(
    ("driver", "person"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("Tesla V100-SXM2-16GB", "v100_16"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3060 12GB", "RTX 3060"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_card_has_one_name(driver: str, person: str, tmp_path: Path) -> None:
    """What is measured on it is what a plan for it knows; another card's is not."""
    assert card_key(driver) == card_key(person) == card_key(card_key(driver))
    refine(driver, tmp_path, MEASURED)
    assert calibration_of(person, tmp_path).samples == tuple(MEASURED)
    assert not calibration_of("rtx5090", tmp_path).samples


def test_the_cards_of_one_name_differ_in_memory_and_cuda_is_the_one_that_is_here() -> None:
    assert card_key("NVIDIA A100-SXM4-40GB") != card_key("NVIDIA A100-SXM4-80GB")
    assert card_key("NVIDIA GeForce RTX 4080") != card_key("NVIDIA GeForce RTX 4080 SUPER")
    assert [device_key(each) for each in ("cpu", "mps", "cpu:0")] == ["cpu", "mps", "cpu"]
    here = card_key(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cuda"
    assert device_key("cuda") == device_key("cuda:0") == here


def test_a_cards_context_stays_when_its_allocator_has_been_measured(tmp_path: Path) -> None:
    """The allocator's high-water mark says nothing of the context: it is added whatever was measured."""
    usual = calibration_of("h200", tmp_path)
    tight = [Sample(f"{n}", n * GIB, round(usual.factor * n * GIB) + (8 << 20)) for n in (1, 2, 3)]
    known = refine("NVIDIA H200", tmp_path, tight)
    assert known.constant_bytes == pytest.approx(8 << 20, abs=2)
    assert known.total(0) >= usual.process_bytes > 400 << 20
    assert known.unseen_bytes == usual.process_bytes and not USUAL["cpu"].unseen_bytes
    assert refine("cpu", tmp_path, MEASURED).total(0) == USUAL["cpu"].process_bytes + 60  # where the process is seen
