"""One micro-batch size tried for real: memory and speed of a few training steps, in a process of its own.

`python -m trainers.batch_probe` reads a Job as one JSON line and writes a Probe as one. It ends at once when its
standard input does, so that no probe outlives the process that started it, whatever killed that one.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from trainers.memory.limit import Memory, is_out_of_memory, memory_of
from trainers.memory.resident import status_bytes

if TYPE_CHECKING:
    import torch

    from trainers.config import RunConfig
    from trainers.data.types import Batch
    from trainers.phase import ActivePhase
    from trainers.run import Run

MICRO_BATCHES = 2  # of each step: only from the second on do gradients stand in memory beside activations
WARM_UP = 2  # steps that are not timed: memory comes from the system, caches fill
PRODUCT_WIDTH, PRODUCTS = {"cuda": 8192, "cpu": 1024}, 12  # of matrix products, the first two not timed
PATIENCE_S = 30.0  # once the timed steps have taken this long, those there are suffice
FIRST_PATIENCE_S = 120.0  # a first step, which may compile, that took longer is all the warm-up there is

Fate = Literal["ok", "out of memory", "killed", "not tried"]
Timing = TypeVar("Timing")


@dataclass(frozen=True)
class Job:
    """What a probe is to do; JSON."""

    config: dict[str, Any]
    """as the run would have it; the probe sets its own batch and takes one worker's part"""
    cache_dir: str
    micro: int
    """rows of a micro-batch"""
    accumulation: int
    """micro-batches of a step of the run, which the speed is given for"""
    steps: int
    """timed"""
    limit_bytes: int | None
    """memory of the process on the CPU, of the device on CUDA; None: what the CUDA device has free"""
    threads: int
    products: bool = False
    """measure the rate of matrix products too"""


@dataclass(frozen=True)
class Probe:
    """What became of one micro-batch size. Sizes in bytes: of the process on the CPU, of the device on CUDA."""

    micro: int
    fate: Fate
    detail: str = ""
    step_ms: float | None = None
    """one update of the run: the median micro-batch times their number, and the median update"""
    tokens_per_s: float | None = None
    """of one worker"""
    resting_bytes: int | None = None
    """before the first step: model, optimizer, gradients' copies, libraries"""
    training_bytes: int | None = None
    """at most while training"""
    peak_bytes: int | None = None
    """at most, an evaluation included"""
    reserved_bytes: int | None = None
    """CUDA: what the allocator held at most, unused blocks included"""
    limit_bytes: int | None = None
    device: str = ""
    product_flops: float | None = None
    """FLOP/s of a large matrix product in the run's arithmetic, where it was asked for"""
    process_bytes: int | None = None
    """of a CPU's process, before the model is built; it has no Ray, so a worker's takes more"""

    @property
    def fits(self) -> bool:
        """It ran, and within the limit."""
        within = self.limit_bytes is None or self.peak_bytes is None or self.peak_bytes <= self.limit_bytes
        return self.fate == "ok" and within


# ---- the child ------------------------------------------------------------------------------------------


def main() -> int:
    """Do the job on standard input. Exit codes: 0 a Probe was written; 2 bad input, the message on standard error."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    job = Job(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    from trainers.errors import UserError
    from trainers.openmp import spin_briefly

    spin_briefly()
    try:
        probe = measure(job)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    with os.fdopen(answer, "w", encoding="utf-8") as out:
        out.write(json.dumps(asdict(probe)) + "\n")
    return 0


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(1)


def measure(job: Job) -> Probe:
    """Train a few steps of the real model at the real sequence length, and evaluate once. Raises UserError."""
    import torch

    from trainers.devices import resolve_device

    torch.set_num_threads(job.threads)
    config = probe_config(job)
    device = resolve_device(config.device)
    memory = memory_of(device, job.limit_bytes, job.threads)
    found: dict[str, Any] = {"device": device.type, "limit_bytes": memory.limit_bytes}
    if device.type != "cuda":
        found["process_bytes"] = status_bytes("VmRSS")
    try:
        found |= _measure(config, job, memory)
        if job.products:
            found["product_flops"] = product_flops(config.precision.compute, device)
        return Probe(job.micro, "ok", **found)
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        memory.lift()
        told = str(error).strip().splitlines() or [type(error).__name__]
        return Probe(job.micro, "out of memory", told[0][:200], peak_bytes=memory.peak(), **found)


def probe_config(job: Job) -> RunConfig:
    """One worker's part of the run, in steps of MICRO_BATCHES micro-batches, with an evaluation of one batch."""
    from trainers.config import RunConfig
    from trainers.config_io import override
    from trainers.run import EVALUATION_ROWS

    config = RunConfig.model_validate(job.config)
    return override(
        config,
        [
            "workers=1",
            f"batch.sequences={job.micro * MICRO_BATCHES}",
            f"batch.micro_sequences={job.micro}",
            f"evaluation.max_tokens={EVALUATION_ROWS * config.sequence_length}",
            "samples.count=0",
        ],
    )


def _measure(config: RunConfig, job: Job, memory: Memory) -> dict[str, Any]:
    from trainers.scratch import scratch_run

    with scratch_run(config, Path(job.cache_dir)) as (run, phase):
        resting = memory.peak()
        memory.hold_to_limit()
        passes, updates = _timed_steps(run, phase, job.steps)
        training = memory.peak()
        run.evaluate(phase)
        micro_batch, update = statistics.median(passes) / MICRO_BATCHES, statistics.median(updates)
    step = job.accumulation * micro_batch + update
    return {
        "step_ms": 1e3 * step,
        "tokens_per_s": job.accumulation * job.micro * config.sequence_length / step,
        "resting_bytes": resting,
        "training_bytes": training,
        "peak_bytes": memory.peak(),
        "reserved_bytes": memory.reserved(),
    }


def product_flops(compute: str, device: torch.device) -> float:
    """FLOP/s of a square matrix product of random numbers (zeros would draw less power and run faster)."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[compute]
    width, wait = PRODUCT_WIDTH["cuda" if device.type == "cuda" else "cpu"], _waiting_for(device)
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(PRODUCTS):
        wait()
        began = time.perf_counter()
        left @ right
        wait()
        seconds.append(time.perf_counter() - began)
    return 2 * width**3 / statistics.median(seconds[2:])


def _timed_steps(run: Run, phase: ActivePhase, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of forward and backward over all micro-batches, and of the update, of each timed step."""
    wait = _waiting_for(run.device)

    def step() -> tuple[float, float]:
        return _timed_step(run, phase, phase.loader.micro_batches(run.progress.phase_step), wait)

    timed = warm_steps(step, steps)
    return [forward for forward, _ in timed], [update for _, update in timed]


def warm_steps(step: Callable[[], Timing], steps: int, clock: Callable[[], float] = time.perf_counter) -> list[Timing]:
    """What `steps` calls of `step` said after WARM_UP others; fewer, but at least one, where they take too long.

    The first call may compile the model and is never among them, however long it takes.
    """
    began = clock()
    step()
    for _ in range(WARM_UP - 1):
        if clock() - began < FIRST_PATIENCE_S:
            step()
    began, timed = clock(), [step()]
    while len(timed) < steps and clock() - began < PATIENCE_S:
        timed.append(step())
    return timed


def _timed_step(run: Run, phase: ActivePhase, batches: list[Batch], wait: Callable[[], None]) -> tuple[float, float]:
    from trainers.loop import forward_backward

    targets = sum(batch.n_targets for batch in batches)
    wait()
    before = time.perf_counter()
    forward_backward(run, phase, batches, targets)
    wait()
    between = time.perf_counter()
    run.engine.update(phase.lr(run.progress.phase_step))
    wait()
    run.progress.advance(targets)
    return between - before, time.perf_counter() - between


def _waiting_for(device: torch.device) -> Callable[[], None]:
    import torch

    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return torch.mps.synchronize if device.type == "mps" else lambda: None


if __name__ == "__main__":
    sys.exit(main())
