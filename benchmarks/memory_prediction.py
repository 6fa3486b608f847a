"""Peak memory of training on the CPU, predicted before it starts and then measured: size, batch, precision, recompute.

Every cell trains in a process of its own: two steps and an evaluation of the real run (the first step takes one row, so
that all state is there), the copy that a save is written from set aside. Judged is the peak above the process before
its model is built. The cells that calibrate are none of those that are judged.

And what planning itself takes: `orchestrate plan` of the largest presets, time and memory of the whole command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.cells import MALLOC, VOCABULARY, said_by, sized, status, text_of_characters
from benchmarks.measure import Figure, report
from benchmarks.workload import scratch
from trainers.config import RunConfig
from trainers.data.types import Batch

BAND = 0.08
LEAST_GIB = 1.0
FEWEST = 12  # judged cells of at least that
PLANNED = ("codelm/xlarge", "genesis/deep_narrow_48")
PLAN_S, PLAN_GIB, PLANS = 5.0, 2.0, 3
"""a plan's wall clock and memory, the median of so many"""


@dataclass(frozen=True)
class Cell:
    """One combination."""

    size: str
    rows: int
    """of a micro-batch"""
    precision: str
    recompute: bool = False
    """activation checkpointing"""
    accumulation: int = 1

    @property
    def name(self) -> str:
        parts = [self.size, self.precision, f"{self.rows} rows"]
        parts += [f"x {self.accumulation}"] if self.accumulation > 1 else []
        return " ".join(parts + (["recompute"] if self.recompute else []))

    def config(self, text: Path) -> RunConfig:
        recompute = str(self.recompute).lower()
        return sized(
            self.size,
            text,
            *(f"precision.compute={self.precision}", f"model.activation_checkpointing={recompute}"),
            *(f"batch.sequences={self.rows * self.accumulation}", f"batch.micro_sequences={self.rows}"),
            "budget.steps=2",
        )


CALIBRATING = (
    Cell("gpt-38M", 2, "fp32"),
    Cell("gpt-57M", 3, "bf16"),
    Cell("gpt-25M", 5, "fp32"),
)
JUDGED = (
    Cell("gpt-25M", 8, "bf16"),
    Cell("gpt-25M", 4, "fp32", accumulation=2),
    Cell("gpt-38M", 1, "fp32"),
    Cell("gpt-38M", 2, "bf16"),
    Cell("gpt-38M", 4, "fp32", recompute=True),
    Cell("gpt-57M", 2, "fp32"),
    Cell("gpt-57M", 4, "fp32", recompute=True),
    Cell("gpt-57M", 2, "bf16", accumulation=2),
    Cell("llama-30M", 2, "fp32"),
    Cell("llama-30M", 4, "bf16", recompute=True),
    Cell("llama-30M", 3, "bf16"),
    Cell("deepnorm-22M", 8, "fp32"),
    Cell("deepnorm-22M", 12, "bf16"),
    Cell("gpt-25M", 16, "fp32"),
)


@dataclass(frozen=True)
class Seen:
    """What one cell took, and what was said of it."""

    cell: str
    before_bytes: int
    """of the process, before its model is built"""
    measured_bytes: int
    """at most, above that"""
    tensor_bytes: int
    """predicted, without what the device adds"""
    moment: str

    def error(self, constant_bytes: float) -> float:
        """Predicted over measured, less one."""
        return (self.tensor_bytes + constant_bytes) / self.measured_bytes - 1


# ---- a process of its own ------------------------------------------------------------------------------------


def train_cell(config: RunConfig, cache: Path) -> tuple[int, int]:
    """Bytes resident before the model is built, and at most above that."""
    import torch

    from trainers.data.prepare import prepare
    from trainers.loop import forward_backward
    from trainers.scratch import scratch_run

    torch.set_num_threads(2)
    prepare(config, cache)
    before = status("VmRSS")
    with scratch_run(config, cache) as (run, phase):
        for step in range(2):
            batches = phase.loader.micro_batches(step) if step else [one_row(phase.loader.micro_batches(0)[0])]
            targets = sum(batch.n_targets for batch in batches)
            forward_backward(run, phase, batches, targets)
            del batches
            run.engine.update(1e-4)
            run.progress.advance(targets)
        run.evaluate(phase)
    return before, status("VmHWM") - before


def one_row(batch: Batch) -> Batch:
    """The first row: enough for the first update, from which on the optimizer's state is in memory."""
    return replace(batch, tokens=batch.tokens[:1], targets=batch.targets[:1], n_targets=batch.tokens.shape[1])


def measured(cell: Cell, text: Path, cache: Path) -> tuple[int, int]:
    """`train_cell` in a fresh process with MALLOC set."""
    cell_given = ["--cell", json.dumps(asdict(cell)), "--text", str(text), "--cache", str(cache)]
    before, above = said_by("benchmarks.memory_prediction", *cell_given)
    return before, above


@dataclass(frozen=True)
class PlanTaken:
    """What one `orchestrate plan` took, from the command to its exit."""

    seconds: float
    gib: float
    """resident at most"""


def plan_taken(preset: str, folder: Path) -> PlanTaken:
    """Of a fresh process, as a person types it."""
    command = [sys.executable, "-m", "orchestrator", "plan", preset, "--json", "--runs-dir", str(folder / "runs")]
    began = time.perf_counter()
    with (folder / "plan.json").open("w") as said:
        child = subprocess.Popen(command, stdout=said)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"{preset}: exit code {child.returncode}"
    cells = json.loads((folder / "plan.json").read_text())["memory"]["cells"]
    assert cells[0]["batches"][0]["total"] > 0
    return PlanTaken(seconds, usage.ru_maxrss / 2**20)


def plan_figures(folder: Path, plans: int) -> list[Figure]:
    """What each preset's plan takes, beside what it may."""
    figures = []
    for preset in PLANNED:
        taken = [plan_taken(preset, folder) for _ in range(plans)]
        seconds, gib = median(each.seconds for each in taken), max(each.gib for each in taken)
        print(f"  plan of {preset}: {seconds:.2f} s, {gib:.2f} GiB", flush=True)
        figures.append(Figure(f"plan of {preset}, the whole command", seconds, "s", bar=PLAN_S))
        figures.append(Figure(f"plan of {preset}, resident at most", gib, "GiB", bar=PLAN_GIB))
    return figures


def predicted(config: RunConfig) -> tuple[int, str]:
    """Bytes of tensors at most, and when."""
    from trainers.memory.calibration import USUAL
    from trainers.memory.prediction import read_footprint

    components = read_footprint(config, VOCABULARY, "cpu", USUAL["cpu"]).at(config.micro_sequences, config.accumulation)
    return components.tensors, components.moment


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one cell of either kind, not kept")
    parser.add_argument("--resume", type=Path, help="a file of cells measured before, which are not measured again")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.cell:
        print(json.dumps(train_cell(Cell(**json.loads(options.cell)).config(options.text), options.cache)))
        return
    count = 1 if options.quick else None
    lines = options.resume.read_text().splitlines() if options.resume and options.resume.exists() else []
    before_now = {seen.cell: seen for seen in (Seen(**json.loads(line)) for line in lines)}
    with scratch() as folder:
        text = text_of_characters(folder)

        def see(cell: Cell) -> Seen:
            if (seen := before_now.get(cell.name)) is not None:
                return seen
            tensors, moment = predicted(cell.config(text))  # before anything of it runs
            before, above = measured(cell, text, folder / "cache")
            seen = Seen(cell.name, before, above, tensors, moment)
            print(f"  {cell.name:40} {above / 2**30:.3f} GiB, tensors {tensors / 2**30:.3f}, {moment}", flush=True)
            if options.resume is not None:
                with options.resume.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(seen)) + "\n")
            return seen

        plans = plan_figures(folder, 1 if options.quick else PLANS)
        calibrating = [see(cell) for cell in CALIBRATING[:count]]
        judged = [see(cell) for cell in JUDGED[:count]]
    large = [seen for seen in judged if seen.measured_bytes / 2**30 >= LEAST_GIB]
    reach = Figure(f"judged cells of {LEAST_GIB:g} GiB and more", len(large), "", bar=FEWEST, at_least=True)
    figures = [*plans, *([] if options.quick else [reach]), *prediction_figures(calibrating, judged)]
    report("memory_prediction", figures, quick=options.quick, calibrating=calibrating, judged=judged, malloc=MALLOC)


def prediction_figures(calibrating: list[Seen], judged: list[Seen]) -> list[Figure]:
    """How far each judged cell is off, with the constant that the others taught."""
    constant = median(seen.measured_bytes - seen.tensor_bytes for seen in calibrating)
    figures = [Figure("constant of this device, from the calibrating cells", constant / 2**20, "MiB")]
    for seen in judged:
        large = seen.measured_bytes / 2**30 >= LEAST_GIB
        figures.append(
            Figure(
                f"{seen.cell}: predicted {(seen.tensor_bytes + constant) / 2**30:.2f}, measured "
                f"{seen.measured_bytes / 2**30:.2f} GiB; off by",
                abs(seen.error(constant)),
                "",
                bar=BAND if large else None,
            )
        )
    return figures


if __name__ == "__main__":
    main()
