"""What gradient accumulation, activation checkpointing and compilation do to memory, speed and loss, beside neither.

Every side trains the same weights on the same rows for the same steps, in a process of its own; the sides take turns,
every round in the reverse order of the one before. Memory is the peak above the process before its model is built, a
step the median of those after the warm-up. The plain side runs twice a round: what two alike differ by is the noise.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.cells import said_by, sized, status, text_of_characters
from benchmarks.measure import Figure, noise_of, ratio, report, rounds
from benchmarks.workload import scratch
from trainers.config import RunConfig

SIZE, ROWS, STEPS, WARM_UP, ROUNDS = "gpt-25M", 8, 6, 2, 4
PLAIN, CONTROL = "plain", "plain, again"
SIDES: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    CONTROL: (),
    "accumulation, 4 x 2 rows": ("batch.micro_sequences=2",),
    "activation checkpointing": ("model.activation_checkpointing=true",),
    "compiled": ("compile=true",),
    "compiled, activation checkpointing": ("compile=true", "model.activation_checkpointing=true"),
}
ROUNDING = 1e-5
"""by how much losses may differ, relatively: sums in another order"""
LESS_MEMORY = ("accumulation, 4 x 2 rows", "activation checkpointing")
RECOMPUTED = 1.4
"""times the plain step, at most: a second forward pass is a third of a step's arithmetic"""


@dataclass(frozen=True)
class Trained:
    """What one process saw."""

    peak_bytes: int
    step_s: float
    losses: list[float]
    """nats a token, before each update"""


def config_of(side: str, text: Path) -> RunConfig:
    return sized(SIZE, text, "model.dropout=0", f"batch.sequences={ROWS}", f"budget.steps={STEPS}", *SIDES[side])


def train(config: RunConfig, cache: Path, steps: int) -> Trained:
    """Train in this process."""
    import torch

    from trainers.data.prepare import prepare
    from trainers.loop import forward_backward
    from trainers.scratch import scratch_run

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    prepare(config, cache)
    before = status("VmRSS")
    losses, seconds = [], []
    with scratch_run(config, cache) as (run, phase):
        for step in range(steps):
            batches = phase.loader.micro_batches(step)
            targets = sum(batch.n_targets for batch in batches)
            began = time.perf_counter()
            loss = forward_backward(run, phase, batches, targets)
            run.engine.update(1e-3)
            seconds.append(time.perf_counter() - began)
            run.progress.advance(targets)
            losses.append(float(loss) / targets)
    return Trained(status("VmHWM") - before, median(seconds[WARM_UP:] or seconds), losses)


def in_a_process(side: str, text: Path, cache: Path, steps: int) -> Trained:
    given = ["--side", side, "--steps", str(steps), "--text", str(text), "--cache", str(cache)]
    trained = Trained(**said_by("benchmarks.trade_offs", *given))
    print(f"  {side:36} {trained.peak_bytes / 2**30:.3f} GiB, {trained.step_s:.3f} s a step", flush=True)
    return trained


def figures_of(seen: dict[str, list[Trained]]) -> list[Figure]:
    plain = seen[PLAIN]
    noise = noise_of(ratio(steps_of(seen[CONTROL]), steps_of(plain)))
    figures = [
        Figure("plain: peak memory", median(each.peak_bytes for each in plain) / 2**20, "MiB"),
        Figure("plain: a step", 1e3 * median(steps_of(plain)), "ms"),
    ]
    for side, trained in seen.items():
        if side == PLAIN:
            continue
        memory = ratio([each.peak_bytes for each in trained], [each.peak_bytes for each in plain])
        step = ratio(steps_of(trained), steps_of(plain))
        apart = max(
            abs(ours / theirs - 1)
            for one, other in zip(trained, plain, strict=True)
            for ours, theirs in zip(one.losses, other.losses, strict=True)
        )
        slower = RECOMPUTED if side == "activation checkpointing" else None
        figures += [
            Figure.of(f"{side}: peak memory / plain", memory, bar=1.0 if side in LESS_MEMORY else None),
            Figure.of(f"{side}: a step / plain", step, bar=slower, noise=noise if slower else None),
            Figure(f"{side}: losses apart, relatively, at most", apart, "", bar=ROUNDING),
        ]
    return figures


def steps_of(trained: list[Trained]) -> list[float]:
    return [each.step_s for each in trained]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of two steps, not kept")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        trained = train(config_of(options.side, options.text), options.cache, options.steps)
        print(json.dumps(asdict(trained)))
        return
    count, steps = (1, 2) if options.quick else (ROUNDS, STEPS)
    with scratch() as folder:
        text = text_of_characters(folder)
        sides = {side: partial(in_a_process, side, text, folder / "cache", steps) for side in SIDES}
        seen = rounds(sides, count, what="trade_offs")
    report("trade_offs", figures_of(seen), quick=options.quick, size=SIZE, rows=ROWS, steps=steps, seen=seen)


if __name__ == "__main__":
    main()
