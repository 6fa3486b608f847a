"""find_batch: the largest micro-batch that fits into memory and the fastest one, both measured.

Every size is tried in a process of its own (trainers/batch_probe.py), so that one which runs out of memory, or which
the kernel kills, is an answer and no accident. Needs no Ray and no MLflow; a sweep calls it once and keeps the answer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.batch_search import measured_memory, search
from orchestrator.console import count, size
from orchestrator.memory_limit import Limit
from orchestrator.plan import StateSizes, packed_tokens
from orchestrator.preflight import check_model
from orchestrator.presets_table import closed_form_parameters
from trainers.batch_probe import MICRO_BATCHES, Job, Probe
from trainers.config import RunConfig
from trainers.data.prepare import prepare
from trainers.data.types import PreparedData
from trainers.errors import DataError, UserError
from trainers.memory.fit import fit

MOST, STEPS = 256, 5  # rows tried at most, and timed steps of each size, where nothing else is said
MEMORY_DEATHS = ("SIGKILL", "SIGABRT", "SIGSEGV", "SIGBUS")  # how the kernel, and libraries short of memory, end one

Say = Callable[[str], None]


@dataclass(frozen=True)
class BatchFindings:
    """What was measured, and the micro-batch to use."""

    probes: tuple[Probe, ...]
    """in rising order of size"""
    device: str
    limit_bytes: int
    limit_source: str
    sequence_length: int
    share: int
    """rows that a worker trains on in each step of the run"""
    bound: str
    """what ended the search: memory, most (the largest size that was allowed) or text (the corpus has no more rows)"""
    fitted: int | None = None
    """rows of the largest micro-batch that fits and divides the rows of a worker's step"""

    @property
    def largest(self) -> Probe:
        """The largest that fits."""
        return [probe for probe in self.probes if probe.fits][-1]

    @property
    def fastest(self) -> Probe:
        """Of those that fit, the one with the most tokens a second."""
        return max((probe for probe in self.probes if probe.fits), key=_speed)

    @property
    def recommended(self) -> Probe:
        """The fastest of those that divide the worker's rows of a step."""
        return max((probe for probe in self.probes if probe.fits and self.share % probe.micro == 0), key=_speed)

    @property
    def override(self) -> str:
        """The setting to paste."""
        return f"batch.micro_sequences={self.recommended.micro}"

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "probes": [{**asdict(probe), "fits": probe.fits} for probe in self.probes],
            "largest": self.largest.micro,
            "fastest": self.fastest.micro,
            "recommended": self.recommended.micro,
        }


def find_batch(
    config: RunConfig,
    limit: Limit,
    *,
    cache_dir: Path,
    threads: int,
    most: int = MOST,
    steps: int = STEPS,
    device: str = "cpu",
    say: Say = lambda text: None,
    trying: Say = lambda text: None,
    data: PreparedData | None = None,
) -> BatchFindings:
    """The largest and the fastest micro-batch of one worker of `config` within `limit`, on this machine.

    Args:
        threads: CPU threads of one worker
        most: rows to try at most
        steps: timed steps of each size, after two that are not
        device: what `config.device` means here: cpu, cuda or mps
        say: told of each size that has been tried, in a line; `trying`: of each one that begins
        data: the prepared text, where the caller has it
    Raises:
        UserError: not even one row fits, or training would refuse the configuration; RuntimeError: a probe failed.
    """
    data = data or prepare(config, cache_dir)
    check_model(config, data.tokenizer.vocab_size)
    bytes_within(config, data.tokenizer.vocab_size, limit)
    there = available_rows(config, data)
    bounded = most if there is None else min(most, there)
    share = config.sequences_per_step // config.workers

    def probe(micro: int) -> Probe:
        trying(f"micro-batch {micro}")
        accumulation = max(1, share // micro)
        job = Job(config.model_dump(mode="json"), str(cache_dir), micro, accumulation, steps, limit.bytes, threads)
        tried = run_probe(job)
        say(told(tried))
        return tried

    probes = search(probe, most=bounded, limit_bytes=limit.bytes, share=share, foresee=device != "cuda")
    known = next((one.limit_bytes for one in probes if one.limit_bytes is not None), limit.bytes or 0)
    if not probes[0].fits:
        raise UserError(_not_even_one(probes[0], known, limit.source))
    fitting = max(one.micro for one in probes if one.fits)
    bound = "memory" if fitting < bounded else "most" if bounded == most else "text"
    fitted = fit(config, measured_memory(probes, known)).micro_sequences
    return BatchFindings(
        tuple(probes), device, known, limit.source, config.sequence_length, share=share, bound=bound, fitted=fitted
    )


def model_bytes(config: RunConfig, vocab_size: int) -> int:
    """Weights, gradients and optimizer state of one worker."""
    parameters = closed_form_parameters(config.model, config.model.vocab_size or vocab_size)
    return StateSizes.plain(parameters, config.resolved_phases()[0].optim).training_bytes


def bytes_within(config: RunConfig, vocab_size: int, limit: Limit) -> int:
    """`model_bytes`; UserError where they are more than `limit`."""
    needs = model_bytes(config, vocab_size)
    if limit.bytes is not None and needs > limit.bytes:
        raise UserError(
            f"the model's weights, gradients and optimizer state alone take {size(needs)}, more than the limit of "
            f"{size(limit.bytes)} ({limit.source}). Raise --memory-limit, or make the model smaller."
        )
    return needs


def available_rows(config: RunConfig, data: PreparedData) -> int | None:
    """The largest micro-batch that the text of the first phase can fill; None for a stream. Raises DataError."""
    lengths = [packed_tokens(source) for source in data.phases[0].sources]
    if any(length is None for length in lengths):
        return None
    rows = sum(max(0, (length or 0) - 1) // config.sequence_length for length in lengths) // MICRO_BATCHES
    if rows == 0:
        raise DataError(
            f"the text has no {MICRO_BATCHES} rows of {config.sequence_length} tokens, which a probe needs. Use more "
            f"text, or lower data.sequence_length."
        )
    return rows


def _speed(probe: Probe) -> float:
    return probe.tokens_per_s or 0.0


def _not_even_one(probe: Probe, limit_bytes: int, source: str) -> str:
    if probe.peak_bytes is None:
        return f"a micro-batch of one row was ended by {probe.detail}; the limit is {size(limit_bytes)} ({source})."
    about = "more than " if probe.fate != "ok" else ""
    return (
        f"not even a micro-batch of one row fits: it takes {about}{size(probe.peak_bytes)}, and the limit is "
        f"{size(limit_bytes)} ({source}). Raise --memory-limit, lower data.sequence_length, or make the model smaller."
    )


def told(probe: Probe) -> str:
    """One line for the terminal."""
    peak = f"peak {size(probe.peak_bytes)}" if probe.peak_bytes is not None else ""
    if probe.fate != "ok":
        return f"micro-batch {probe.micro}: {probe.fate}" + (f", {peak}" if peak else "")
    within = "" if probe.fits else ", does not fit"
    return f"micro-batch {probe.micro}: {count(_speed(probe))} tokens/s, {probe.step_ms:.4g} ms a step, {peak}{within}"


# ---- a process a probe ------------------------------------------------------------------------------------


def run_probe(job: Job) -> Probe:
    """The probe's answer; where a signal ended it (the kernel takes memory back so), a Probe that says `killed`.

    Raises UserError for bad input, RuntimeError with the last words of a probe that failed otherwise.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        tempfile.TemporaryDirectory(prefix="find-batch-") as scratch,
    ):
        child = subprocess.Popen(
            [sys.executable, "-m", "trainers.batch_probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env=_environment(scratch),
        )
        try:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(json.dumps(asdict(job)) + "\n")
            child.stdin.flush()  # and stays open: its end is the child's
            answer = child.stdout.read()
            child.wait()
        except BrokenPipeError:
            answer = ""
            child.wait()
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        last_words = errors.read().strip()
    return _understood(job, child.returncode, answer, last_words)


def _environment(scratch: str) -> dict[str, str]:
    """Our packages are found wherever we were started; what a killed probe could not tidy up is in `scratch`."""
    path = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {"TMPDIR": scratch, "PYTHONPATH": os.pathsep.join(part for part in path if part)}


def _understood(job: Job, code: int, answer: str, last_words: str) -> Probe:
    if code == 0 and answer:
        return Probe(**json.loads(answer))
    if code == 2:
        raise UserError(last_words)
    name = signal.Signals(-code).name if code < 0 else ""
    if name in MEMORY_DEATHS:
        return Probe(job.micro, "killed", name, limit_bytes=job.limit_bytes)
    ending = name or f"exit code {code}"
    raise RuntimeError(f"the probe of a micro-batch of {job.micro} failed ({ending}): {last_words[-2000:]}")
