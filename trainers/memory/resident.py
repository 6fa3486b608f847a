"""What this process has resident in memory, and its peak, which Linux can be made to forget. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from pathlib import Path

FORGET_PEAK = "5"
"""written to /proc/self/clear_refs, sets VmHWM back to VmRSS (proc(5), since Linux 4.0)"""


def resident_peak(platform: str = sys.platform) -> int:
    """The most bytes that this process has had resident, since `forget_resident_peak` where that is possible.

    Not ru_maxrss on Linux, where a child begins with its parent's; without /proc that counts in KiB, macOS's in bytes.
    """
    seen = status_bytes("VmHWM") if platform == "linux" else None
    if seen is not None:
        return seen
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform == "darwin" else peak * 1024


def forget_resident_peak() -> bool:
    """Let the peak begin anew at what is resident now; False where the system has no way to."""
    try:
        Path("/proc/self/clear_refs").write_text(FORGET_PEAK)
    except OSError:
        return False
    return True


def release_free_memory() -> None:
    """Give the system back what the allocator keeps of freed memory (glibc's does), so that it is not resident."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def status_bytes(field: str) -> int | None:
    """Bytes of a field of /proc/self/status, such as VmRSS; None where there is none."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
