"""P9: how long a checkpoint keeps the training waiting, against one memory copy, and what it costs behind its back."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainers.openmp import spin_briefly

spin_briefly()  # as every command of ours does, before torch is imported

import torch  # noqa: E402

from benchmarks.measure import Figure, quantile, ratio, report  # noqa: E402
from benchmarks.workload import QUIET, OurLoop, our_loop, scratch  # noqa: E402
from trainers.config import RunConfig  # noqa: E402
from trainers.config_io import override  # noqa: E402
from trainers.presets import PRESETS  # noqa: E402

BAR_COPIES, BAR_SMALL_S = 2.0, 0.005
BARE_CHUNK = 8 << 20


def state_of(d_model: int, n_layers: int) -> RunConfig:
    """A GPT with 12 bytes of state a parameter, trained on rows so short that a step costs little."""
    shape = [f"model.d_model={d_model}", f"model.n_layers={n_layers}", "model.n_heads=8", "model.dropout=0"]
    short = ["model.context_length=16", "batch.sequences=2", "checkpoint.keep_last_n=1", "checkpoint.save_best=false"]
    return override(PRESETS["fundamentallm/small"](), [*shape, *short, *QUIET, "budget.steps=1000000"])


@dataclass(frozen=True)
class Saves:
    """One entry a save of the same run."""

    size_bytes: int
    stalls_s: list[float]
    """of the whole `run.save`: snapshot, generators' states, meta, and starting the writer"""
    copies_s: list[float]
    """one copy of as many bytes between two warm buffers, timed beside each save"""
    durable_s: list[float]
    plain_writes_s: list[float]
    """the same bytes written and synced by a bare loop of write(2), timed beside each save"""
    quiet_steps_s: list[float]
    """a step with nothing in flight, the mean beside each save"""
    busy_steps_s: list[float]
    """a step while the writer works"""


def saves(config: RunConfig, folder: Path, count: int) -> Saves:
    """`count` saves of a run, after one that warms everything up."""
    with our_loop(config, folder) as ours:
        ours.steps(2)
        size = sum(t.numel() * t.element_size() for tensors in ours.run._files().values() for t in tensors.values())
        source, target = torch.ones(size // 4), torch.zeros(size // 4)
        found = Saves(size, [], [], [], [], [], [])
        for index in range(count + 1):
            quiet = _mean_step(ours, 3)
            copy = _clock(lambda: target.copy_(source))
            ours.steps(1)  # a save follows a step, not another copy: the caches are as a step leaves them for both
            stall = _clock(lambda: ours.run.save(ours.phase))
            busy = _steps_in_flight(ours)
            ours.run.store.wait()
            saved = ours.run.store.last_save
            assert saved is not None and ours.run.store.last_error is None, ours.run.store.last_error
            plain = _clock(lambda: _write_plainly(folder / "plain", source))
            if index:
                found.stalls_s.append(stall)
                found.copies_s.append(copy)
                found.durable_s.append(saved.durable_s)
                found.plain_writes_s.append(plain)
                found.quiet_steps_s.append(quiet)
                found.busy_steps_s.append(busy)
        return found


def _clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _mean_step(ours: OurLoop, count: int) -> float:
    return _clock(lambda: ours.steps(count)) / count


def _steps_in_flight(ours: OurLoop) -> float:
    """The mean step as long as the writer works; one step at least (a small state is gone before the next one)."""
    writing = ours.run.store._in_flight
    assert writing is not None
    taken = [_mean_step(ours, 1)]
    while not writing.done():
        taken.append(_mean_step(ours, 1))
    return sum(taken) / len(taken)


def _write_plainly(path: Path, data: torch.Tensor) -> None:
    view = memoryview(data.numpy().data).cast("B")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        for start in range(0, len(view), BARE_CHUNK):
            os.write(descriptor, view[start : start + BARE_CHUNK])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    path.unlink()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--saves", type=int, default=12)
    parser.add_argument("--directory", type=Path, help="the disk to write to (default: the temporary folder)")
    options = parser.parse_args(arguments)
    count = 2 if options.quick else options.saves

    figures: list[Figure] = []
    samples = {}
    sizes = {"small": (280, 4), "large": (384, 4)} if options.quick else {"small": (280, 4), "large": (768, 6)}
    for name, (width, depth) in sizes.items():
        with scratch(options.directory) as folder:
            found = saves(state_of(width, depth), folder, count)
        samples[name] = found
        label = f"{found.size_bytes / 1e6:.0f} MB"
        copies = ratio(found.stalls_s, found.copies_s)
        if name == "large":
            figures.append(Figure.of(f"{label}: stall / one memory copy", copies, bar=BAR_COPIES))
            figures.append(Figure(f"{label}: stall", quantile(found.stalls_s, 0.5) * 1e3, "ms"))
        else:
            figures.append(Figure(f"{label}: stall", quantile(found.stalls_s, 0.5) * 1e3, "ms", bar=BAR_SMALL_S * 1e3))
            figures.append(Figure(f"{label}: worst stall", max(found.stalls_s) * 1e3, "ms"))
        figures += [
            Figure(f"{label}: one memory copy", quantile(found.copies_s, 0.5) * 1e3, "ms"),
            Figure(f"{label}: durable after", quantile(found.durable_s, 0.5) * 1e3, "ms"),
            Figure.of(f"{label}: plain write + fsync / ours (speed)", ratio(found.plain_writes_s, found.durable_s)),
            Figure.of(f"{label}: step while saving / quiet step", ratio(found.busy_steps_s, found.quiet_steps_s)),
        ]
    report("checkpoint_stall", figures, quick=options.quick, samples=samples)


if __name__ == "__main__":
    main()
