"""The driver of `orchestrate bench`: the cells, their table, picture and MLflow run, and what plans learn of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.batch_findings import BatchQuestion, machine_for
from orchestrator.bench import Bench, BenchCell, BenchQuestion, measure_bench
from orchestrator.console import count, out, print_json, size
from orchestrator.display import Display
from orchestrator.experiment import cache_dir
from orchestrator.finders import (
    Finding,
    Typed,
    finding_folder,
    finding_name,
    log_finding,
    show_way_on,
    whole_folder,
    write_json,
)
from orchestrator.runs import check_runs_dir
from orchestrator.signals import StopSignals
from orchestrator.sweeps.memory import Footprints
from search_spaces.precisions import Device
from trainers.config import RunConfig
from trainers.data.prepare import prepare
from trainers.memory.calibration import refine

PLOT, RESULT, TABLE = "bench.png", "bench.json", "bench.md"
HEADINGS = ("batch", "run as", "tokens/s", "step ms", "peak memory", "predicted", "left", "MFU")


def run(typed: Typed, question: BenchQuestion, runs_dir: Path, *, json: bool) -> int:
    """Measure, keep and show. Exit code 0.

    Raises UserError for bad input, KeyboardInterrupt with nothing left behind.
    """
    question.check()
    config = typed.target.config
    check_runs_dir(runs_dir)
    machine = machine_for(config, BatchQuestion(question.memory_limit, 1, question.steps))
    signals, started = StopSignals(), time.monotonic()
    with signals.heard(), signals.leaving_at_once():
        name = finding_name("bench", config, runs_dir, question.to_json())
        header = f"bench {typed.target.label}: rows of {config.sequence_length} tokens on {machine.device}"
        with Display(header, None, terminal=sys.stdout.isatty() and not json, json=json) as display:
            data = prepare(config, cache_dir(runs_dir), progress=display.packing)
            display.status("opening MLflow")
            store = _store(runs_dir)
            device: Device = "cuda" if machine.device == "cuda" else "mps" if machine.device == "mps" else "cpu"
            bench = measure_bench(
                config,
                question,
                machine.limit,
                data,
                Footprints(data.tokenizer.vocab_size, device, cache_dir(runs_dir)),
                cache_dir=cache_dir(runs_dir),
                threads=machine.threads,
                device=machine.device,
                say=display.note,
                trying=display.status,
            )
            _teach(bench, runs_dir)
            display.status("drawing the picture")
            result = _result(typed, name, question, bench, time.monotonic() - started)
            folder = finding_folder(runs_dir, name)
            _keep(folder, result, bench, f"{config.preset}: bench")
            display.status("telling MLflow")
            run_id, where = log_finding(store, _finding(name, folder, config, question, bench))
    result |= {"folder": str(folder), "mlflow_run_id": run_id}
    if json:
        print_json(result)
    else:
        out().print(bench_table(bench))
        show_way_on(result, f"{folder}/{PLOT}", where)
    return 0


def _store(runs_dir: Path) -> Any:
    """Before the measurements: a store that cannot be used is better known now."""
    from orchestrator.tracking import open_store

    return open_store(runs_dir)


def _teach(bench: Bench, runs_dir: Path) -> None:
    """What was measured sharpens the plans to come."""
    refine(bench.device, cache_dir(runs_dir), [sample for cell in bench.cells if (sample := cell.sample()) is not None])


def _result(typed: Typed, name: str, question: BenchQuestion, bench: Bench, seconds: float) -> dict[str, Any]:
    return {
        "kind": "bench",
        "name": name,
        "preset": typed.target.config.preset,
        "settings": question.to_json(),
        "device": bench.device,
        "limit_bytes": bench.limit_bytes,
        "sequence_length": bench.sequence_length,
        "cells": [cell.to_json() for cell in bench.cells],
        "commands": {"plan": typed.command("plan", "--variants")},
        "seconds": round(seconds, 1),
    }


def _keep(folder: Path, result: Mapping[str, Any], bench: Bench, title: str) -> None:
    from orchestrator.finder_plots import plot_bench

    with whole_folder(folder) as draft:
        write_json(draft / RESULT, result)
        (draft / TABLE).write_text(markdown(bench, title), encoding="utf-8")
        plot_bench(bench, draft / PLOT, title)


def _finding(name: str, folder: Path, config: RunConfig, question: BenchQuestion, bench: Bench) -> Finding:
    """Metrics by way of running, with the batch as their step."""
    rows = []
    for cell in bench.cells:
        values = {
            "perf/tokens_per_s": cell.probe.tokens_per_s,
            "perf/step_ms": cell.probe.step_ms,
            "perf/model_flops_utilisation": cell.utilisation,
            "mem/peak_gib": _gib(cell.measured_bytes),
            "mem/predicted_gib": _gib(cell.predicted_bytes),
            "mem/headroom_gib": _gib(cell.headroom_bytes),
            "bench/ran": float(cell.probe.fate == "ok"),
        }
        way = cell.way.replace(" ", "-")
        named = {f"{way}/{key}": value for key, value in values.items() if value is not None}
        rows.append({"step": cell.rows, **named})
    tags = {"bench.device": bench.device, "bench.limit_bytes": str(bench.limit_bytes)}
    return Finding("bench", name, folder, config, question.to_json(), rows, tags, "FINISHED", "completed")


def _gib(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 2**30


# ---- the table ------------------------------------------------------------------------------------------------


def bench_table(bench: Bench) -> Table:
    """Every cell; one that did not run says why."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "run as" else "right", no_wrap=True)
    table.add_column("")
    for cell in bench.cells:
        table.add_row(*_words(cell), _remark(cell))
    return table


def markdown(bench: Bench, title: str) -> str:
    """The same as a page."""
    lines = [f"# {title}", "", f"Rows of {count(bench.sequence_length)} tokens on {bench.device}, measured "
             f"{time.strftime('%Y-%m-%d')}; the limit is {size(bench.limit_bytes)}.", ""]  # fmt: skip
    lines += [f"| {' | '.join(HEADINGS)} | |", "|" + "--:|" * len(HEADINGS) + "---|"]
    lines += [f"| {' | '.join(_words(cell))} | {_remark(cell)} |" for cell in bench.cells]
    return "\n".join(lines) + "\n"


def _words(cell: BenchCell) -> list[str]:
    probe = cell.probe
    return [
        count(cell.rows),
        cell.way,
        count(probe.tokens_per_s) if probe.tokens_per_s else "",
        f"{probe.step_ms:.4g}" if probe.step_ms else "",
        size(cell.measured_bytes) if cell.measured_bytes is not None else "",
        size(cell.predicted_bytes) if cell.predicted_bytes is not None else "",
        size(cell.headroom_bytes) if cell.headroom_bytes is not None and cell.headroom_bytes > 0 else "",
        f"{cell.utilisation:.1%}" if cell.utilisation is not None else "",
    ]


def _remark(cell: BenchCell) -> str:
    if cell.probe.fate == "ok":
        return "" if cell.probe.fits else "beyond the limit"
    return f"{cell.probe.fate}: {cell.probe.detail}" if cell.probe.detail else cell.probe.fate
