"""What a device adds is learnt from measurements and kept in a file that may be lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainers.memory.calibration import FILE, USUAL, Sample, calibration_of, keep, refine

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
    three = refine("cpu", tmp_path, MEASURED[2:])
    assert three.constant_bytes == 60
    assert three.total(5 * GIB) == 5 * GIB + usual.process_bytes + 60
    assert calibration_of("cpu", tmp_path) == three
    assert three.speed("fp32") == pytest.approx(4e9) and three.speed("bf16") is None


def test_devices_do_not_mix_and_a_torn_file_is_none(tmp_path: Path) -> None:
    refine("NVIDIA H200", tmp_path, MEASURED)
    assert calibration_of("cpu", tmp_path) == USUAL["cpu"]
    assert calibration_of("NVIDIA H200", tmp_path).samples == tuple(MEASURED)
    assert calibration_of("NVIDIA A100", tmp_path).constant_bytes == USUAL["cuda"].constant_bytes
    (tmp_path / FILE).write_text("{")
    assert calibration_of("NVIDIA H200", tmp_path).samples == ()
    keep(USUAL["cpu"], tmp_path)
    assert calibration_of("cpu", tmp_path) == USUAL["cpu"]
