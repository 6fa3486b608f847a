"""The driver of `orchestrate find-batch`: the search, its table and picture, and the setting to paste."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table
from rich.text import Text

from orchestrator.batch_finder import BatchFindings, available_rows, bytes_within, find_batch
from orchestrator.console import count, out, pairs, print_json, size
from orchestrator.display import Display
from orchestrator.experiment import cache_dir
from orchestrator.finders import (
    Finding,
    Typed,
    finding_folder,
    finding_name,
    log_finding,
    show_intent,
    show_way_on,
    whole_folder,
    write_json,
)
from orchestrator.memory_limit import Limit, limit_for
from orchestrator.ray_cluster import usable_cpus
from orchestrator.runs import check_runs_dir
from orchestrator.signals import StopSignals
from trainers.batch_probe import WARM_UP, Probe
from trainers.config import RunConfig
from trainers.data.prepare import prepare
from trainers.errors import UserError

PLOT, RESULT = "batch.png", "batch.json"
BUSY_PERCENT, BUSY_S = 20.0, 0.5  # use of all cores by others, over so long, from which speeds are doubtful
NOT_USED = ("batch.micro_sequences",)


MOST_ROWS, MOST_STEPS = 1_000_000_000, 10_000_000


@dataclass(frozen=True)
class BatchQuestion:
    """The search that was asked for."""

    memory_limit: str | None
    most: int
    steps: int

    def check(self) -> None:
        """Raises UserError for numbers that ask for nothing."""
        for option, value, most in (("--max", self.most, MOST_ROWS), ("--steps", self.steps, MOST_STEPS)):
            if not 1 <= value <= most:
                raise UserError(f"{option} {value}: at least 1, and at most {most:,}.")

    def to_json(self) -> dict[str, Any]:
        return {"memory_limit": self.memory_limit, "max": self.most, "steps": self.steps}


@dataclass(frozen=True)
class Machine:
    """What a worker of the run has here."""

    device: str
    threads: int
    limit: Limit


def machine_for(config: RunConfig, question: BatchQuestion) -> Machine:
    """Raises UserError for a device that is not there or cannot compute the precision."""
    from trainers.devices import check_machine, resolve_device

    device = resolve_device(config.device)
    check_machine(config, device)
    limit = limit_for(device.type, question.memory_limit, config.workers)
    return Machine(device.type, max(1, usable_cpus() // config.workers), limit)


def dry_run(config: RunConfig, question: BatchQuestion, runs_dir: Path, *, json: bool) -> int:
    """Say what would be tried, within what. Raises UserError as far as a survey can tell what doing it would refuse."""
    from orchestrator.survey_plan import survey_plan

    question.check()
    machine, report = machine_for(config, question), survey_plan(config, runs_dir)
    needs = bytes_within(config, report.survey.vocab_size, machine.limit)
    sizes = [1 << exponent for exponent in range(question.most.bit_length()) if 1 << exponent < question.most]
    sizes.append(question.most)
    limit = machine.limit.bytes
    facts = {"sizes": sizes, "limit_bytes": limit, "model_bytes": needs, "device": machine.device}
    bound = size(limit) + f" ({machine.limit.source})" if limit else machine.limit.source
    rows = [
        ("sizes", f"{', '.join(map(str, sizes))} rows while they fit, then bisection"),
        ("each", f"{WARM_UP} + {question.steps} real steps of {config.sequence_length} tokens a row, in a process"),
        ("limit", f"{bound} for each of {config.workers} worker{'s' if config.workers > 1 else ''}"),
        ("model", f"{size(needs)} of weights, gradients and optimizer state; libraries and activations come on top"),
        ("findings", f"into {runs_dir / '.find'} and MLflow; no Ray is started"),
    ]
    return show_intent(facts, rows, json=json)


def run(typed: Typed, question: BatchQuestion, runs_dir: Path, *, json: bool) -> int:
    """Search, keep and show what was found. Exit code 0.

    Raises UserError for bad input and where not even one row fits, KeyboardInterrupt with nothing left behind.
    """
    question.check()
    config = typed.target.config
    check_runs_dir(runs_dir)
    machine = machine_for(config, question)
    signals, started = StopSignals(), time.monotonic()
    with signals.heard(), signals.leaving_at_once():
        name = finding_name("find-batch", config, runs_dir, question.to_json())
        bound = f"within {size(machine.limit.bytes)}" if machine.limit.bytes else "within the GPU's free memory"
        header = f"find-batch {typed.target.label}: rows of {config.sequence_length} tokens {bound}"
        with Display(header, None, terminal=sys.stdout.isatty() and not json, json=json) as display:
            data = prepare(config, cache_dir(runs_dir), progress=display.packing)
            available_rows(config, data)
            display.status("opening MLflow")
            store = _store(runs_dir)
            busy = psutil.cpu_percent(BUSY_S)
            found = find_batch(
                config,
                machine.limit,
                cache_dir=cache_dir(runs_dir),
                threads=machine.threads,
                most=question.most,
                steps=question.steps,
                device=machine.device,
                say=display.note,
                trying=display.status,
                data=data,
            )
            display.status("drawing the picture")
            result = _result(typed, name, question, found, time.monotonic() - started)
            result["notes"] = busy_notes(busy)
            folder = finding_folder(runs_dir, name)
            _keep(folder, result, found, f"{config.preset}: micro-batch")
            display.status("telling MLflow")
            run_id, where = log_finding(store, _finding(name, folder, config, question, found))
    result |= {"folder": str(folder), "mlflow_run_id": run_id}
    print_json(result) if json else _show(result, found, where)
    return 0


def _store(runs_dir: Path) -> Any:
    """Before the search: a store that cannot be used is better known now."""
    from orchestrator.tracking import open_store

    return open_store(runs_dir)


# ---- what is kept and shown ------------------------------------------------------------------------------


def explanation(found: BatchFindings) -> list[str]:
    """Which is the largest, which the fastest, which to use, and why they differ."""
    largest, fastest, used = found.largest, found.fastest, found.recommended
    why = {
        "memory": f"more rows pass the limit of {size(found.limit_bytes)}",
        "most": "more were not tried (--max)",
        "text": "the text has no more rows",
    }[found.bound]
    lines = [f"the largest micro-batch that fits is {largest.micro}: {why}"]
    if fastest.micro == largest.micro:
        lines.append(f"it is the fastest too, with {count(_speed(fastest))} tokens/s")
    else:
        gain = f"{_speed(fastest) / _speed(largest) - 1:.0%} more than the largest"
        lines.append(
            f"the fastest is {fastest.micro}, with {count(_speed(fastest))} tokens/s, {gain}; likely because "
            f"{_reason(found)}"
        )
    lines.append(_use(found, used, fastest))
    return lines


def busy_notes(percent: float) -> list[str]:
    """A warning where other processes had the CPU before the search began."""
    if percent < BUSY_PERCENT:
        return []
    return [
        f"other processes used {percent:.0f}% of the CPU when the search began: the speeds are doubtful, not the memory"
    ]


def _reason(found: BatchFindings) -> str:
    """Why more rows are usually not faster on such a device; not measured here."""
    if found.device == "cpu":
        return "what a larger pass writes no longer fits the caches"
    return "the device is busy with fewer rows already, and more only move more memory"


def _use(found: BatchFindings, used: Probe, fastest: Probe) -> str:
    accumulation = found.share // used.micro
    passes = f"{accumulation} micro-batches a step" if accumulation > 1 else "no accumulation"
    line = f"use {used.micro}: the fastest that divides the {found.share} rows of a worker's step ({passes})"
    if fastest.micro > found.share:
        line += f"; a batch of {fastest.micro} rows would make more tokens a second, and is another training"
    return line


def _speed(probe: Probe) -> float:
    assert probe.tokens_per_s is not None
    return probe.tokens_per_s


def _result(typed: Typed, name: str, question: BatchQuestion, found: BatchFindings, seconds: float) -> dict[str, Any]:
    return {
        "kind": "find-batch",
        "name": name,
        "preset": typed.target.config.preset,
        "settings": question.to_json(),
        "override": found.override,
        "explanation": explanation(found),
        "commands": commands(typed, found),
        "seconds": round(seconds, 1),
        "findings": found.to_json(),
    }


def commands(typed: Typed, found: BatchFindings) -> dict[str, str]:
    """To paste: the training with the micro-batch to use, and a sweep whose trials take no larger one."""
    return {
        "train": typed.command("train", found.override, without=NOT_USED),
        "tune": typed.command("tune", found.override, "--space", "lr", without=NOT_USED),
    }


def _keep(folder: Path, result: Mapping[str, Any], found: BatchFindings, title: str) -> None:
    from orchestrator.finder_plots import plot_batch

    with whole_folder(folder) as draft:
        write_json(draft / RESULT, result)
        plot_batch(found, draft / PLOT, title)


def _finding(name: str, folder: Path, config: RunConfig, question: BatchQuestion, found: BatchFindings) -> Finding:
    """Metrics with the micro-batch as their step."""
    rows = []
    for probe in found.probes:
        values = {
            "perf/tokens_per_s": probe.tokens_per_s,
            "perf/step_ms": probe.step_ms,
            "mem/peak_gib": probe.peak_bytes / 2**30 if probe.peak_bytes is not None and probe.fate == "ok" else None,
            "find/fits": float(probe.fits),
        }
        rows.append({"step": probe.micro, **{key: value for key, value in values.items() if value is not None}})
    tags = {
        "find.largest": str(found.largest.micro),
        "find.fastest": str(found.fastest.micro),
        "find.recommended": str(found.recommended.micro),
        "find.limit_bytes": str(found.limit_bytes),
    }
    return Finding("find-batch", name, folder, config, question.to_json(), rows, tags, "FINISHED", "completed")


def _show(result: Mapping[str, Any], found: BatchFindings, where: str) -> None:
    console = out()
    console.print(probes_table(found))
    rows = [("", line) for line in result["explanation"]]
    rows += [("note", line) for line in result["notes"]]
    rows += [("limit", f"{size(found.limit_bytes)}: {found.limit_source}")]
    console.print(pairs([(name, Text(value)) for name, value in rows]))
    show_way_on(result, f"{result['folder']}/{PLOT}", where)


def probes_table(found: BatchFindings) -> Table:
    """Every size that was tried, or foreseen not to fit."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("micro-batch", "tokens/s", "step ms", "peak memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    table.add_column("")
    for probe in found.probes:
        table.add_row(
            str(probe.micro),
            count(probe.tokens_per_s) if probe.tokens_per_s else "",
            f"{probe.step_ms:.4g}" if probe.step_ms else "",
            _peak(probe),
            "yes" if probe.fits else "no",
            _mark(probe, found),
        )
    return table


def _peak(probe: Probe) -> str:
    if probe.peak_bytes is None:
        return ""
    about = {"ok": "", "not tried": "~"}.get(probe.fate, "> ")
    return about + size(probe.peak_bytes)


def _mark(probe: Probe, found: BatchFindings) -> str:
    named = (("largest", found.largest), ("fastest", found.fastest), ("use this", found.recommended))
    marks = [name for name, one in named if one.micro == probe.micro]
    if probe.fate != "ok":
        marks.append(f"{probe.fate}: {probe.detail}" if probe.detail else probe.fate)
    return ", ".join(marks)
