"""Limit: how much memory one worker may take, as a person said it or as this machine has it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.console import size
from trainers.errors import UserError
from trainers.memory.calibration import USUAL

UNITS = {"B": 1} | {f"{letter}iB": 1 << shift for letter, shift in zip("KMGT", (10, 20, 30, 40), strict=True)}
UNITS |= {f"{letter}B": 10**power for letter, power in zip("KMGT", (3, 6, 9, 12), strict=True)}
HEADROOM_BYTES, HEADROOM_SHARE = 512 << 20, 0.1  # left to the rest of the machine: the larger of the two
CONTEXT_BYTES = USUAL["cuda"].unseen_bytes  # of the GPU, that each process takes beside what torch allocates
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limit:
    """Memory that one worker may take."""

    bytes: int | None
    """None: what the CUDA device has free, which the probe finds out"""
    source: str
    """where the number comes from, for a person"""


def parse_size(text: str, what: str) -> int:
    """Bytes of '2GiB', '800 MB', '1.5GiB'. UserError for anything else; `what` names the option."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    asked = float(found[1]) * units[found[2].lower()] if found and found[2].lower() in units else 0.0
    if not 1 <= asked < 2**63:
        raise UserError(f"{what} is an amount of memory above 0 with its unit, such as 2GiB or 800MB; got {text!r}.")
    return int(asked)


def limit_for(device: str, asked: str | int | None, workers: int, gpu_share: float | None = None) -> Limit:
    """What each of `workers` on this machine may take on `device` (cpu, cuda, mps).

    `asked`: --memory-limit, as typed or in bytes. `gpu_share`: of one GPU, that a worker has; None: it finds out by
    itself what there is. Raises UserError where the GPU cannot be asked.
    """
    if asked is not None:
        n_bytes = asked if isinstance(asked, int) else parse_size(asked, "--memory-limit")
        return Limit(n_bytes, "--memory-limit")
    if device == "cuda":
        return Limit(None, "free on the GPU") if gpu_share is None else part_of_gpu(gpu_share, _free_on_gpu())
    available, where = available_memory()
    headroom = int(max(HEADROOM_BYTES, HEADROOM_SHARE * available))
    share = f", divided by {workers} workers" if workers > 1 else ""
    source = f"{size(available)} available {where}, less {size(headroom)} of headroom{share}"
    return Limit(max(1, (available - headroom) // workers), source)


def part_of_gpu(share: float, free: int) -> Limit:
    """What torch may allocate in each process that has `share` of a GPU, of which one process would find `free`."""
    if share >= 1:
        return Limit(free, "free on the GPU")
    part = int(share * (free + CONTEXT_BYTES)) - CONTEXT_BYTES  # what one finds is so beside its own context
    return Limit(max(1, part), f"{share:g} of the {size(free)} free on the GPU")


def _free_on_gpu() -> int:
    """Asked by a process of its own: this one would keep a context on the GPU for as long as it lives."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.mem_get_info()[0])"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        raise UserError(f"the GPU cannot be asked for its memory ({last}). Say it: --memory-limit 20GiB.")
    return int(asked.stdout)


def available_memory() -> tuple[int, str]:
    """Bytes that could be taken now without swapping, and what bounds them: the machine or this process's cgroup."""
    machine, group = psutil.virtual_memory().available, _cgroup_room()
    return (group, "in this container") if group is not None and group < machine else (machine, "on this machine")


def _cgroup_room() -> int | None:
    """What the tightest memory limit of our cgroups leaves, page cache counted as free; None where there is none."""
    rooms = [room for folder in _cgroup_folders() if (room := _room(folder)) is not None]
    return min(rooms, default=None)


def _cgroup_folders() -> list[Path]:
    """Our cgroup and those above it, version 2 or 1; inside a container only the root may be there."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = CGROUPS / controllers
            inner = root / path.lstrip("/")
            folders += [root, *(place for place in (inner, *inner.parents) if place.is_relative_to(root))]
    return folders


def _room(folder: Path) -> int | None:
    for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            limit, taken = (folder / most).read_text().strip(), int((folder / used).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit == "max":
            return None
        cache = int(statistics.get("inactive_file", 0))
        return max(0, int(limit) - (taken - cache))
    return None
