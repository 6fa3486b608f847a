"""Process: who holds something, told apart from a later process with the same number."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

EXITING = 0x4  # PF_EXITING in the flags of /proc/PID/stat (linux/sched.h)
SIGKILL_BIT = 1 << 8  # signal 9 in the masks of /proc/PID/status


@dataclass(frozen=True)
class Process:
    pid: int
    host: str
    started: str
    """when it started, as the host counts it; with the pid it names one process for good"""

    @staticmethod
    def current() -> Process:
        pid = os.getpid()
        return Process(pid, socket.gethostname(), _start_time(pid) or "")

    @property
    def is_here(self) -> bool:
        """Whether it ran on this host."""
        return self.host == socket.gethostname()

    def is_alive(self) -> bool | None:
        """True while it runs, False once it is dead, a zombie or being killed; None: on another host, nobody knows."""
        if not self.is_here:
            return None
        return self.pid > 0 and _start_time(self.pid) == self.started and not _is_ending(self.pid)


def _start_time(pid: int) -> str | None:
    """Boot and clock ticks since then, or what `ps` says; None where no such process is."""
    if not Path("/proc/self/stat").exists():
        return _ps(pid, "lstart")
    fields = _stat(pid)
    return f"{_boot()}:{fields[19].decode()}" if fields else None


def _is_ending(pid: int) -> bool:
    """A zombie, or on its way there: a killed process looks alive until the kernel has freed its memory."""
    if not Path("/proc/self/stat").exists():
        return (_ps(pid, "state") or "Z").startswith("Z")
    fields = _stat(pid)
    if not fields or fields[0] in (b"Z", b"X", b"x") or int(fields[6]) & EXITING:
        return True
    return _sigkill_is_pending(pid)


def _sigkill_is_pending(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    masks = [line.split()[1] for line in status.splitlines() if line.startswith((b"SigPnd:", b"ShdPnd:"))]
    return any(int(mask, 16) & SIGKILL_BIT for mask in masks)


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third, the state, on; empty where no such process is."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text[text.rindex(b")") + 1 :].split()  # the second field, the name, may itself hold spaces and brackets


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]


def _ps(pid: int, field: str) -> str | None:
    """A field of `ps`, for systems without /proc (macOS)."""
    done = subprocess.run(["ps", "-o", f"{field}=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
