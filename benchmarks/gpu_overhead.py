"""One GPU: our loop against the bare one in bf16 on a GPT of 124 M parameters; MFU, host waits, checkpoint stall.

Needs torch, numpy, pydantic, pyyaml and safetensors alone. `--device cpu --tiny` runs the same lines anywhere.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bare_loop import BareLoop
from benchmarks.gpu_rig import CODES, write_text
from benchmarks.gpu_table import H100_FLOPS
from benchmarks.gpu_updates import QUIET_STEPS, host_waits
from benchmarks.measure import Figure, noise_of, quantile, ratio, report, rounds
from benchmarks.workload import BareJob, OurLoop, our_loop, scratch
from orchestrator.plan import flops_per_token
from trainers.batch_probe import product_flops
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.presets import PRESETS

BLOCK = 20


def config_of(text: Path, options: argparse.Namespace) -> RunConfig:
    """GPT-2's shape (124 M parameters), or a tiny one."""
    shape = (64, 2, 2, 32, 4, 512) if options.tiny else (768, 12, 12, 1024, 32, 50304)
    width, depth, heads, length, rows, vocab = shape
    return override(
        PRESETS["fundamentallm/small"](),
        [
            *(f"model.d_model={width}", f"model.n_layers={depth}", f"model.n_heads={heads}"),
            *(f"model.context_length={length}", f"model.vocab_size={vocab}", "model.dropout=0"),
            *(f"batch.sequences={options.rows or rows}", "logging.every_steps=10", "budget.steps=1000000"),
            *("checkpoint.every_minutes=null", "checkpoint.keep_last_n=1", "checkpoint.save_best=false"),
            *("evaluation.every_epochs=null", "samples.count=0", "precision.compute=bf16"),
            *(f"device={options.device}", f"compile={str(options.compile).lower()}"),
            f'data.sources=[{{"corpus": "{text}"}}]',
        ],
    )


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds until the device has done it."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


# ---- what the machine can do -----------------------------------------------------------------------------


def copy_to_host_s(size_bytes: int, device: str) -> float:
    """Seconds of one copy of so many bytes into warm (on CUDA: pinned) host memory."""
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.zeros(size_bytes // 4, pin_memory=device == "cuda")
    return quantile([timed(lambda: target.copy_(source, non_blocking=True), device) for _ in range(5)], 0.5)


# ---- what the loops do -----------------------------------------------------------------------------------


def bare_steps(loop: BareLoop) -> None:
    for _ in range(BLOCK):
        loop.step()


def measure(ours: OurLoop, options: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    config, device = ours.run.config, options.device
    total = (options.pairs + options.warm_up) * BLOCK
    job = BareJob.of(ours, total)
    bare, control = (job.loop(ours.run.model, torch.bfloat16) for _ in range(2))
    sides = {
        "ours": functools.partial(timed, functools.partial(ours.steps, BLOCK), device),
        "bare": functools.partial(timed, functools.partial(bare_steps, bare), device),
        "control": functools.partial(timed, functools.partial(bare_steps, control), device),
    }
    rounds(sides, options.warm_up)
    seconds = rounds(sides, options.pairs)

    logged = [value for _, value in ours.logged("train/loss")]
    differences = [abs(a - b) / abs(b) for a, b in zip(logged, bare.losses, strict=True)]
    same = [abs(a - b) / abs(b) for a, b in zip(control.losses, bare.losses, strict=True)]
    alike = ratio(seconds["control"], seconds["bare"])

    parameters = sum(p.numel() for p in ours.run.model.parameters())
    speed = config.tokens_per_step * BLOCK / float(np.median(seconds["ours"]))
    achieved = speed * flops_per_token(config, parameters)
    ceiling = product_flops("bf16" if device == "cuda" else "fp32", ours.run.device)
    waits: list[str] | None = None
    if device == "cuda":
        waits = host_waits(ours)
    else:
        ours.steps(QUIET_STEPS)
    ours.steps(1)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    del bare, control
    figures = [
        Figure.of("our step / bare step", ratio(seconds["ours"], seconds["bare"]), bar=1.02, noise=noise_of(alike)),
        Figure.of("control, bare / bare", alike),
        Figure("bare step", float(np.median(seconds["bare"])) / BLOCK * 1e3, "ms"),
        Figure("losses, largest relative difference to bare", max(differences), ""),
        Figure("the same between the two bare loops", max(same), ""),
        Figure("tokens a second, ours", speed, ""),
        Figure("MFU against 989 TFLOP/s", achieved / H100_FLOPS, ""),
        Figure("share of the matrix product measured here", achieved / ceiling, "", bar=0.54, at_least=True),
        Figure("matrix product, bf16", ceiling / 1e12, "TFLOP/s"),
        Figure("parameters", parameters / 1e6, "M"),
        Figure("peak memory, three copies of the model", peak_gib, "GiB"),
    ]
    if waits is not None:
        figures.append(Figure("host waits in nine steps that do not log", len(waits), "", bar=0))
        print("".join(f"  waited at {where}\n" for where in sorted(set(waits))), end="")
    return figures, {"seconds_a_block": seconds, "losses": logged, "steps_a_block": BLOCK}


def stalls(ours: OurLoop, device: str) -> tuple[list[Figure], dict[str, Any]]:
    """Saves of the whole state, each while training goes on."""
    found: dict[str, list[float]] = {"stall_s": [], "durable_s": [], "copy_s": []}
    size = sum(t.numel() * t.element_size() for tensors in ours.run._files().values() for t in tensors.values())
    for index in range(6):
        ours.steps(2)
        synchronise(device)
        start = time.perf_counter()
        ours.run.save(ours.phase)
        stall = time.perf_counter() - start
        ours.steps(1)
        ours.run.store.wait()
        saved = ours.run.store.last_save
        assert saved is not None and ours.run.store.last_error is None, ours.run.store.last_error
        if index:
            found["stall_s"].append(stall)
            found["durable_s"].append(saved.durable_s)
            found["copy_s"].append(copy_to_host_s(size, device))
    label = f"checkpoint of {size / 1e9:.2f} GB"
    return [
        Figure.of(f"{label}: stall / one copy to the host", ratio(found["stall_s"], found["copy_s"]), bar=2.0),
        Figure(f"{label}: stall", quantile(found["stall_s"], 0.5) * 1e3, "ms"),
        Figure(f"{label}: durable after", quantile(found["durable_s"], 0.5), "s"),
    ], found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal of the same lines with a tiny model, not kept")
    parser.add_argument("--compile", action="store_true", help="compile our model; the bare one stays as it is")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before the clock counts")
    parser.add_argument("--rows", type=int, help="sequences a step (default 32)")
    parser.add_argument("--tokens", type=int, help="of the synthetic text (default 20 M)")
    parser.add_argument("--quick", action="store_true", help="three pairs, not kept")
    options = parser.parse_args(arguments)
    if options.quick or options.tiny:
        options.pairs, options.warm_up = 3, 1

    with scratch() as folder:
        text = folder / "text.txt"
        write_text(text, options.tokens or (100_000 if options.tiny else 20_000_000), 500 if options.tiny else CODES)
        with our_loop(config_of(text, options), folder) as ours:
            figures, samples = measure(ours, options)
            more, saved = stalls(ours, options.device)
    name = "gpu_overhead_compiled" if options.compile else "gpu_overhead"
    report(name, [*figures, *more], quick=options.quick or options.tiny, **samples, **saved)


if __name__ == "__main__":
    main()
