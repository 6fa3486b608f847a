"""Honest timing on a noisy machine: pairs in ABBA order, an A/A control, medians with bootstrap intervals."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios ours / theirs with its 95% bootstrap interval."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.4f} (95% {self.low:.4f} to {self.high:.4f}, {self.pairs} pairs)"


def ratio(ours: list[float], theirs: list[float], *, resamples: int = 4000) -> Ratio:
    """Each of our times over the time measured beside it."""
    ratios = np.asarray(ours) / np.asarray(theirs)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (resamples, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))


def abba(first: Callable[[], float], second: Callable[[], float], pairs: int) -> tuple[list[float], list[float]]:
    """Times of both, a pair at a time, each pair in the other order than the one before: slow drift cancels."""
    firsts, seconds = [], []
    for index in range(pairs):
        for which in ((first, second), (second, first))[index % 2]:
            (firsts if which is first else seconds).append(which())
    return firsts, seconds


def machine() -> dict[str, Any]:
    """What a number depends on, without a host's name."""
    import torch

    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def save(name: str, results: dict[str, Any]) -> Path:
    """benchmarks/results/NAME.json with the machine beside the figures."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    plain = {key: asdict(value) if isinstance(value, Ratio) else value for key, value in results.items()}
    path.write_text(json.dumps({"machine": machine(), **plain}, indent=1) + "\n")
    return path
