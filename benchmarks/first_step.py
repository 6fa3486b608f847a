"""P7: from `orchestrate train` to the first optimizer step, against a ten-line TorchTrainer and bare Ray.

The corpus is packed and the MLflow store exists, as they do for whoever trains a second time.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np

from benchmarks.measure import Figure, noise_of, ratio, report, rounds
from benchmarks.workload import scratch
from trainers.record import read_rows

BAR = 1.15
PATIENCE_S = 240.0  # with one process: a first step takes some ten seconds

TORCH_TRAINER = """\
import time, ray.train
from ray.train.torch import TorchTrainer

def work():
    import torch
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    open({stamp!r}, "w").write(str(time.time()))

TorchTrainer(
    work,
    scaling_config=ray.train.ScalingConfig(num_workers=1),
    run_config=ray.train.RunConfig(storage_path={storage!r}),
).fit()
"""
BARE_RAY = """\
import time, ray
ray.init()

@ray.remote
class Worker:
    def work(self):
        import torch
        open({stamp!r}, "w").write(str(time.time()))

ray.get(Worker.remote().work.remote())
"""
TRACED = """\
import functools, json, os, sys, time
started = float(os.environ["BENCHMARK_STARTED"])
marks = []
def mark(name):
    marks.append([name, time.time() - started])
def trace(owner, name, label):
    call = getattr(owner, name)
    @functools.wraps(call)
    def traced(*args, **kwargs):
        mark(label + " >")
        try:
            return call(*args, **kwargs)
        finally:
            mark(label + " <")
    setattr(owner, name, traced)
mark("python is up")
from orchestrator.cli import main
mark("command line imported")
import orchestrator.launch as launch
mark("driver imported")
trace(launch, "settle", "settle")
trace(launch, "data_hashes", "data hashes")
trace(launch, "prepare", "open packed data")
trace(launch.Tracker, "open", "wait for MLflow, begin its run")
trace(launch.OpeningStore, "_open", "(thread) open the MLflow store")
trace(launch.Driver, "_watch", "workers")
import orchestrator.ray_cluster as ray_cluster
environment = ray_cluster._environment
def then_ray(*args):
    environment(*args)  # has to come before the import
    mark("import ray >")
    import ray
    mark("import ray <")
    trace(ray, "init", "ray.init")
ray_cluster._environment = then_ray
code = main(json.loads(os.environ["BENCHMARK_ARGUMENTS"]))
json.dump(marks, open(os.environ["BENCHMARK_MARKS"], "w"))
sys.exit(code)
"""


def script(text: str, folder: Path, numbers: count[int]) -> float:
    """Seconds from the start of a process running `text` until it wrote its time stamp."""
    stamp = folder / f"stamp-{next(numbers)}"
    source = folder / "script.py"
    source.write_text(text.format(stamp=str(stamp), storage=str(folder / "storage")), encoding="utf-8")
    started = time.time()
    # A Ray of its own, as `orchestrate train` starts one: without this it joins a cluster that runs on the machine.
    environment = {**_environment(), "RAY_ADDRESS": "local"}
    command = [sys.executable, str(source)]
    subprocess.run(command, capture_output=True, check=True, env=environment, timeout=PATIENCE_S)
    return float(stamp.read_text()) - started


def orchestrate(runs_dir: Path, numbers: count[int], wrapper: Path | None = None) -> float:
    """Seconds from the start of `orchestrate train` until the row of step 1 stood in the record."""
    name = f"run-{next(numbers)}"
    arguments = _arguments(name, runs_dir)
    command = [sys.executable, *([str(wrapper)] if wrapper else ["-m", "orchestrator"]), *arguments]
    started = time.time()
    environment = {
        **_environment(),
        "BENCHMARK_STARTED": str(started),
        "BENCHMARK_ARGUMENTS": json.dumps(arguments),
        "BENCHMARK_MARKS": str(runs_dir / "marks"),
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=PATIENCE_S)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    row = next(row for row, _ in read_rows(runs_dir / name / "metrics.jsonl") if row["step"] == 1)
    return row["time_ms"] / 1e3 - started


def _arguments(name: str, runs_dir: Path) -> list[str]:
    short = ["budget.steps=2", "logging.every_steps=1", "evaluation.max_tokens=512", "samples.count=0"]
    return ["train", "fundamentallm/tiny", "--name", name, "--runs-dir", str(runs_dir), *short]


def _environment() -> dict[str, str]:
    """As a person's shell would have it, and quiet."""
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(Path(__file__).parent.parent)}


def timeline(runs_dir: Path, folder: Path, numbers: count[int]) -> list[tuple[str, float]]:
    """Where the driver is when, in seconds since its process began; the last mark is the first step."""
    wrapper = folder / "traced.py"
    wrapper.write_text(TRACED, encoding="utf-8")
    first_step = orchestrate(runs_dir, numbers, wrapper)
    marks = [tuple(mark) for mark in json.loads((runs_dir / "marks").read_text())]
    return [*(mark for mark in marks if mark[1] < first_step), ("first step", first_step)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--timeline", action="store_true", help="only show where our driver is when")
    options = parser.parse_args(arguments)

    with scratch() as folder:
        numbers, runs_dir = count(), folder / "runs"
        print("  packing the corpus and making the MLflow store", flush=True)
        orchestrate(runs_dir, numbers)  # packs the corpus and makes the MLflow store
        if options.timeline:
            for name, seconds in timeline(runs_dir, folder, numbers):
                print(f"{seconds:8.2f} s  {name}")
            return
        found = rounds(
            {
                "ours": functools.partial(orchestrate, runs_dir, numbers),
                "trainer": functools.partial(script, TORCH_TRAINER, folder, numbers),
                "control": functools.partial(script, TORCH_TRAINER, folder, numbers),
                "ray": functools.partial(script, BARE_RAY, folder, numbers),
            },
            1 if options.quick else options.pairs,
            what="first step",
        )
        marks = timeline(runs_dir, folder, numbers)
    control = ratio(found["control"], found["trainer"])
    figures = [
        Figure.of("first step, ours / ten-line TorchTrainer", ratio(found["ours"], found["trainer"]), bar=BAR),
        Figure.of("control, TorchTrainer / TorchTrainer", control),
        Figure.of("first step, ours / bare Ray (init, actor, torch)", ratio(found["ours"], found["ray"])),
        *(Figure(label, float(np.median(found[side])), "s") for side, label in _SIDES.items()),
    ]
    report("first_step", figures, quick=options.quick, noise=noise_of(control), timeline=marks, samples=found)


_SIDES = {"ours": "first step, ours", "trainer": "first step, TorchTrainer", "ray": "bare Ray"}


if __name__ == "__main__":
    main()
