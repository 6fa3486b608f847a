"""One micro-batch size tried in a process of its own: real memory, real speed, and endings that harm nobody."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.trainers.small_runs import WORDS, config_for
from trainers.batch_probe import FIRST_PATIENCE_S, PATIENCE_S, Job, Probe, is_out_of_memory, warm_steps
from trainers.data.prepare import prepare

PROJECT = Path(__file__).parents[2]
MIB = 1 << 20
ROOMY = 8 << 30


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Some 270 KiB of activations a row."""
    folder = tmp_path_factory.mktemp("probe")
    text = folder / "text.txt"
    text.write_text(" ".join(WORDS[index % 7 + index % 3] for index in range(40_000)))
    model = {"d_model": 32, "n_layers": 2, "n_heads": 2, "context_length": 64, "dropout": 0.1}
    config = config_for(text, model=model)
    prepare(config, folder / "cache")
    return Job(config.model_dump(mode="json"), str(folder / "cache"), 1, 4, 2, ROOMY, 1)


def start(job: Job) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", "trainers.batch_probe"],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(asdict(job)) + "\n")
    child.stdin.flush()
    return child


def probed(job: Job) -> Probe:
    with start(job) as child:
        assert child.stdout is not None and child.stderr is not None
        answer, said = child.stdout.read(), child.stderr.read()
        assert child.wait() == 0, said
    return Probe(**json.loads(answer))


def test_more_rows_take_more_memory_by_what_they_need(job: Job) -> None:
    few, many = probed(replace(job, micro=4)), probed(replace(job, micro=256))
    for probe in (few, many):
        assert probe.fits and probe.fate == "ok" and probe.device == "cpu" and probe.limit_bytes == ROOMY
        assert probe.resting_bytes and probe.training_bytes and probe.peak_bytes and probe.step_ms
        assert 50 * MIB < probe.resting_bytes <= probe.training_bytes <= probe.peak_bytes < 2**31
        rows = probe.micro * 4  # four micro-batches make a step
        assert probe.tokens_per_s == pytest.approx(rows * 64 / (probe.step_ms / 1e3))
    assert few.training_bytes and many.training_bytes
    a_row = (many.training_bytes - few.training_bytes) / 252
    # the hidden vectors, attention weights and logits that a row keeps for the backward pass, in fp32
    assert 100 * 1024 < a_row < 2 * MIB


@pytest.mark.parametrize(
    ("seconds", "steps", "timed"),
    [
        ([9, 3, 1, 1, 1], 3, [1, 1, 1]),
        ([PATIENCE_S + 10, 3, 1, 1, 1], 3, [1, 1, 1]),  # it compiled for longer than all steps may take
        ([FIRST_PATIENCE_S + 10, 1, 1, 1], 3, [1, 1, 1]),  # so long that nobody waits for a second warm-up
        ([9, 3, PATIENCE_S - 1, 2, 2, 2], 4, [PATIENCE_S - 1, 2]),
        ([PATIENCE_S + 10, 3, PATIENCE_S + 1, 2], 4, [PATIENCE_S + 1]),  # slow, but a step all the same
    ],
)
def test_a_first_step_is_no_timing_however_long_it_takes(seconds: list[float], steps: int, timed: list[float]) -> None:
    """Steps that take as long as they are told to, by a clock that they alone move."""
    now, to_come = [0.0], iter(seconds)

    def step() -> float:
        taken = next(to_come)
        now[0] += taken
        return taken

    assert warm_steps(step, steps, lambda: now[0]) == timed


def test_a_limit_below_what_the_libraries_take_ends_it_before_the_first_step(job: Job) -> None:
    probe = probed(replace(job, limit_bytes=60 * MIB))
    assert not probe.fits and probe.fate == "out of memory" and "before the first step" in probe.detail
    assert probe.peak_bytes is not None and probe.peak_bytes > 60 * MIB


def test_address_space_is_a_belt_where_far_too_much_is_asked_for(job: Job) -> None:
    """8,192 rows want some 2 GiB: refused by this process's own limit, without the memory being taken."""
    text = Path(job.config["data"]["sources"][0]["corpus"])
    assert text.stat().st_size > 2 * 64 * 1024  # the rows below are there
    wide = {**job.config, "model": {**job.config["model"], "d_ff": 200_000}}
    limit = 700 * MIB
    probe = probed(replace(job, config=wide, micro=512, limit_bytes=limit))
    assert not probe.fits and probe.fate == "out of memory", probe
    assert probe.peak_bytes is not None and probe.peak_bytes < limit + 1200 * MIB


def test_bad_input_is_told_in_one_line(job: Job) -> None:
    source = {**job.config["data"]["sources"][0], "corpus": "/nowhere/at/all.txt"}
    with start(replace(job, config={**job.config, "data": {**job.config["data"], "sources": [source]}})) as child:
        assert child.stdout is not None and child.stderr is not None
        assert (child.stdout.read(), child.wait()) == ("", 2)
        said = child.stderr.read()
    assert "/nowhere/at/all.txt" in said and "Traceback" not in said


def test_it_does_not_outlive_whoever_holds_its_input(job: Job) -> None:
    child = start(replace(job, steps=10**6))
    assert child.stdin is not None and child.stdout is not None
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(timeout=30) == 1 and child.stdout.read() == ""
    child.stdout.close()
    assert child.stderr is not None
    child.stderr.close()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_refused_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_an_allocation_that_torch_cannot_make_is_recognised() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
