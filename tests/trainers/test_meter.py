"""The peak of memory is the same figure in whatever unit the kernel counts."""

from __future__ import annotations

import resource

from trainers.meter import peak_resident_bytes


def test_the_peak_is_in_bytes_on_every_system() -> None:
    with open("/proc/self/status", encoding="ascii") as status:
        (high_water_kib,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert abs(peak_resident_bytes("linux") - high_water_kib * 1024) < 64 << 20
    assert peak_resident_bytes("darwin") == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_resident_bytes("linux") > 100 * peak_resident_bytes("darwin")
