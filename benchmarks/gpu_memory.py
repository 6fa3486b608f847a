"""What training takes of a GPU's memory: predicted and measured, and what happens where it does not suffice."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks.gpu_check import Skipped
from benchmarks.gpu_process import answers
from benchmarks.gpu_rig import Rig, at_least, within
from benchmarks.measure import Figure
from trainers.batch_probe import MICRO_BATCHES, Job, Probe
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.data.prepare import prepare
from trainers.loop import forward_backward
from trainers.memory.calibration import calibration_of
from trainers.memory.fit import fit
from trainers.memory.prediction import Device, Footprint, read_footprint
from trainers.scratch import scratch_run

BAND = 0.08  # between predicted and measured bytes of tensors
PROBE_S = 120.0  # at most, of one probe
WAYS = {
    "fp32": (),
    "bf16": ("precision.compute=bf16",),
    "bf16, recomputed": ("precision.compute=bf16", "model.activation_checkpointing=true"),
    "fp32, accumulated": ("batch.micro_sequences=4",),
}


def kind_of(device: str) -> Device:
    return "cuda" if device == "cuda" else "cpu"


def footprint_of(config: RunConfig, vocab_size: int, device: str) -> Footprint:
    """What the plan says of it, with what is usual on such a device."""
    kind = kind_of(device)
    return read_footprint(config, vocab_size, kind, calibration_of(kind, None))


def predicted_memory(rig: Rig) -> list[Figure]:
    """The plan's bytes of tensors are those at the peak of two steps and an evaluation, within 8%."""
    if not rig.cuda:
        raise Skipped("a process's memory is judged by the suite memory_prediction, in processes of its own")
    shape = (
        ("model.d_model=512", "model.n_layers=8", "model.n_heads=8", "model.context_length=256", "batch.sequences=16")
        if not rig.tiny
        else ()
    )
    take_memory(rig, rig.config(*shape))  # libraries set their workspaces aside
    figures = []
    for way, settings in WAYS.items():
        config = rig.config(*shape, *settings)
        predicted, measured = take_memory(rig, config)
        figures.append(
            within(
                f"{way}: predicted {predicted / 2**20:.0f}, measured {measured / 2**20:.0f} MiB; off by",
                abs(predicted / measured - 1),
                1.0 if rig.tiny else BAND,  # of a tiny model the allocator's blocks are the largest part
            )
        )
    return figures


def take_memory(rig: Rig, config: RunConfig) -> tuple[int, int]:
    """Bytes of tensors at most, predicted and measured on the CUDA device, above what was there before."""
    gc.collect()  # what the run before leaves in cycles
    torch.cuda.synchronize(rig.device)
    before = torch.cuda.memory_allocated(rig.device)
    torch.cuda.reset_peak_memory_stats(rig.device)
    with scratch_run(config, rig.cache) as (run, phase):
        vocabulary = run.data.tokenizer.vocab_size
        for step in range(2):
            batches = phase.loader.micro_batches(step)
            targets = sum(batch.n_targets for batch in batches)
            forward_backward(run, phase, batches, targets)
            run.engine.update(1e-4)
            run.progress.advance(targets)
        run.evaluate(phase)
        measured = torch.cuda.max_memory_allocated(rig.device) - before
    footprint = footprint_of(config, vocabulary, rig.device.type)
    return footprint.at(config.micro_sequences, config.accumulation).tensors, measured


def out_of_memory(rig: Rig) -> list[Figure]:
    """A micro-batch beyond a memory limit is told as out of memory, and the one that the plan fits into it runs."""
    rows, few = (128, 4) if rig.tiny else (256, 16)
    # so wide that the activations of all rows are far beyond what those of a few take
    wide = ("model.d_ff=100000", "model.n_layers=1", *(("model.d_model=8",) if rig.tiny else ()))
    config = rig.config(*wide, f"batch.sequences={rows}")
    footprint = footprint_of(config, prepare(config, rig.cache).tokenizer.vocab_size, rig.device.type)
    limit = int(1.1 * footprint.peak_bytes(few, MICRO_BATCHES))
    batch = fit(config, footprint.memory(limit))
    assert batch.micro_sequences is not None
    refused = probed(rig, config, rows, limit)
    smaller = override(config, [f"batch.micro_sequences={batch.micro_sequences}"])
    ran = probed(rig, smaller, batch.micro_sequences, limit)
    if refused.fate == "out of memory":
        assert refused.detail, "nothing was said of it"
    return [
        within(f"{rows} rows in {limit / 2**30:.2f} GiB: told as something else", refused.fate != "out of memory", 0),
        at_least("rows that the plan fits into it", batch.micro_sequences, few),
        within(f"{batch.micro_sequences} rows: did not run ({ran.fate})", not ran.fits, 0),
    ]


def probed(rig: Rig, config: RunConfig, rows: int, limit_bytes: int | None) -> Probe:
    """Two steps of so many rows at a time, in a process of its own."""
    threads = torch.get_num_threads()
    job = Job(config.model_dump(mode="json"), str(rig.cache), rows, 1, 2, limit_bytes, threads)
    (answer,) = answers("trainers.batch_probe", json.dumps(asdict(job)), PROBE_S)
    return Probe(**json.loads(answer))


MEMORY: tuple[Callable[[Rig], list[Figure]], ...] = (predicted_memory, out_of_memory)
