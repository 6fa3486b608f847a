"""Honest timing on a noisy machine: pairs in ABBA order, an A/A control, medians with bootstrap intervals."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

RESULTS = Path(__file__).parent / "results"
CONTROL_BAND = 0.01
"""how far an A/A control may lie from 1 before a report says that the machine was too noisy for a verdict"""

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios ours / theirs with its 95% bootstrap interval."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.4f} (95% {self.low:.4f} to {self.high:.4f}, {self.pairs} pairs)"


@dataclass(frozen=True)
class Figure:
    """One line of a report: what was measured, what it came to, and what it was to be."""

    what: str
    value: float
    unit: str
    """x for a ratio"""
    low: float | None = None
    high: float | None = None
    bar: float | None = None
    """the value is to be at most this (at least, where `at_least`); None: published beside the others"""
    at_least: bool = False
    noise: str | None = None
    """why no verdict can be given"""

    @classmethod
    def of(cls, what: str, ratio: Ratio, *, bar: float | None = None, noise: str | None = None) -> Figure:
        return cls(what, ratio.median, "x", ratio.low, ratio.high, bar, noise=noise)

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        if self.noise:
            return f"no verdict: {self.noise}"
        return "met" if (self.value >= self.bar if self.at_least else self.value <= self.bar) else "MISSED"

    @property
    def shown(self) -> str:
        """The value with its interval and unit."""
        interval = f" ({_number(self.low)} to {_number(self.high)})" if self.low is not None else ""
        return f"{_number(self.value)}{interval} {self.unit}"

    @property
    def wanted(self) -> str:
        return "" if self.bar is None else f"{'≥' if self.at_least else '≤'} {_number(self.bar)}"


@dataclass(frozen=True)
class Cost:
    """What a piece of work took."""

    seconds: float
    cpu_seconds: float
    """of all threads of this process"""


def ratio(ours: Sequence[float], theirs: Sequence[float], *, resamples: int = 4000) -> Ratio:
    """Each of our times over the time measured beside it."""
    ratios = np.asarray(ours) / np.asarray(theirs)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (resamples, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))


def rounds(
    sides: Mapping[str, Callable[[], Outcome]], count: int, *, what: str | None = None
) -> dict[str, list[Outcome]]:
    """What each side returned, `count` times: every round runs all sides, in the reverse order of the round before.

    With two sides this is ABBA: what drifts slowly falls on both alike. `what` names the rounds in a line after each.
    """
    results: dict[str, list[Outcome]] = {name: [] for name in sides}
    start = time.perf_counter()
    for index in range(count):
        for name in list(sides)[:: -1 if index % 2 else 1]:
            results[name].append(sides[name]())
        if what is not None:
            done, spent = index + 1, time.perf_counter() - start
            left = spent / done * (count - done)
            print(f"  {what}: round {done} of {count}, {spent:.0f} s, about {left:.0f} s to go", flush=True)
    return results


def timed(work: Callable[[], object]) -> Cost:
    """One call of `work`."""
    cpu, start = time.process_time(), time.perf_counter()
    work()
    return Cost(time.perf_counter() - start, time.process_time() - cpu)


def noise_of(control: Ratio) -> str | None:
    """Why an A/A control forbids a verdict; None: it does not."""
    if abs(control.median - 1) <= CONTROL_BAND:
        return None
    return f"two alike loops differ by {control.median - 1:+.1%}"


def quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(np.asarray(values), share))


# ---- the machine -----------------------------------------------------------------------------------------


def _cpu_times() -> list[int]:
    stat = Path("/proc/stat")
    return [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]] if stat.exists() else [0] * 8


_AT_START = _cpu_times(), time.process_time()


def machine() -> dict[str, Any]:
    """What a number depends on, without a host's name; `steal` and `others` since this process began."""
    import torch

    then, now = np.asarray(_AT_START[0]), np.asarray(_cpu_times())
    elapsed = max(1, int((now - then).sum()))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "steal": round(int((now - then)[7]) / elapsed, 4),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())


# ---- reports ---------------------------------------------------------------------------------------------


def report(name: str, figures: Sequence[Figure], *, quick: bool, path: Path | None = None, **raw: Any) -> None:
    """Print the figures and keep them with `raw` samples in `path`; without one in results/NAME.json, unless this was
    a `quick` rehearsal."""
    print(f"\n{name}" + (" (quick rehearsal, not kept)" if quick and path is None else ""))
    width = max(len(figure.what) for figure in figures)
    for figure in figures:
        print(f"  {figure.what:{width}}  {figure.shown:34} {figure.wanted:>10}  {figure.verdict}".rstrip())
    if path is None and not quick:
        path = RESULTS / f"{name}.json"
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        content = {"machine": machine(), "figures": list(figures), **raw}
        path.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into a report")


def _number(value: float | None) -> str:
    """Four significant digits, without an exponent where people would not write one."""
    assert value is not None
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
