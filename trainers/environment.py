"""What besides the configuration decides the bits of a run, and what a change of it means."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

# key -> why a difference may change the last bits of a result
REASONS: dict[str, str] = {
    "threads": "sums are split among the threads, and another split rounds differently",
    "world_size": "gradients are summed over the workers, and another number of them rounds differently",
    "torch": "another version may compute the same thing in another order",
    "torch_build": "another build may use other math libraries",
    "python": "another Python ships another standard library, which the embedded corpus is made of",
    "device": "another kind of device rounds differently",
    "cpu": "the math libraries choose their kernels by the processor's model",
    "cpu_capability": "other vector instructions sum in another order",
    "gpu": "another GPU model uses other kernels",
    "cuda": "another CUDA version ships other kernels",
    "cudnn": "another cuDNN version ships other kernels",
    "compile": "compiled kernels are fused, and round differently",
    "engine": "it sums the workers' gradients in another order",
}


def environment(device: torch.device | str, world_size: int, compile: bool, engine: str = "torch") -> dict[str, str]:
    """The fingerprint of the surroundings, as text by name: what must be equal for bit-equal results."""
    device = torch.device(device)
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16],
        "device": device.type,
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "world_size": str(world_size),
        "compile": str(compile).lower(),
        "engine": engine,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def explain_difference(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A sentence for each difference that may change the bits; empty where the run can go on exactly."""
    return [
        f"{key} was {then.get(key, 'absent')} and is now {now.get(key, 'absent')}: {reason}, "
        f"so the run may not go on bit for bit."
        for key, reason in REASONS.items()
        if then.get(key) != now.get(key)
    ]


def _cpu_model() -> str:
    """The processor's name as the system gives it."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Hardware", "cpu model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
