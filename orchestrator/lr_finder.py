"""The driver of `orchestrate find-lr`: a range test in this process, its curve, and the rate it suggests."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from orchestrator.console import count, out, pairs, print_json
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
from orchestrator.preflight import check_device, check_model
from orchestrator.runs import check_runs_dir
from orchestrator.signals import StopSignals
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.data.prepare import prepare
from trainers.lr_curve import LrCurve, LrSuggestion, NoSuggestion, geometric, suggest
from trainers.openmp import spin_briefly

if TYPE_CHECKING:
    from orchestrator.tracking import EndState, Store

PLOT, RESULT = "lr.png", "lr.json"


@dataclass(frozen=True)
class LrQuestion:
    """The sweep that was asked for."""

    low: float
    high: float
    steps: int

    @property
    def lrs(self) -> tuple[float, ...]:
        return geometric(self.low, self.high, self.steps)


def one_process(config: RunConfig) -> RunConfig:
    """The same step taken by one worker: several workers' rows become further micro-batches."""
    if config.workers == 1:
        return config
    return override(config, ["workers=1", f"batch.micro_sequences={config.micro_sequences}"])


def lr_path(config: RunConfig) -> str:
    """The setting that the tested phase, the first, takes its learning rate from."""
    own = config.phases[0].optim is not None if config.phases else False
    return f"phases.{config.phases[0].name}.optim.lr" if own else "optim.lr"


def dry_run(config: RunConfig, question: LrQuestion, runs_dir: Path, *, json: bool) -> int:
    """Say what would be done. Raises UserError for whatever doing it would refuse, as far as a survey can tell."""
    from orchestrator.survey_plan import survey_plan

    lrs = question.lrs
    report = survey_plan(config, runs_dir)
    tokens = (len(lrs) + 1) * config.tokens_per_step
    facts = {"lrs": lrs, "steps": len(lrs), "tokens": tokens, "parameters": report.parameters}
    rows = [
        ("sweep", f"{len(lrs)} updates from lr {lrs[0]:g} to {lrs[-1]:g}, each {lrs[1] / lrs[0]:.3f} times the last"),
        ("step", f"{config.sequences_per_step} rows of {config.sequence_length} tokens, {count(tokens)} tokens in all"),
        ("model", f"{count(report.parameters)} parameters on {report.device}, in this process and without Ray"),
        ("findings", f"into {runs_dir / '.find'} and MLflow"),
    ]
    return show_intent(facts, rows, json=json)


def find_lr(typed: Typed, question: LrQuestion, runs_dir: Path, *, json: bool) -> int:
    """Run the test, keep and show what it found. Exit code 0.

    Raises UserError for bad input, KeyboardInterrupt with nothing left behind, and NoSuggestion, once the curve is
    kept, where no rate can be read from it.
    """
    lrs = question.lrs
    config = one_process(typed.target.config)
    check_runs_dir(runs_dir)
    spin_briefly()
    check_device(config)
    signals, started = StopSignals(), time.monotonic()
    with signals.heard(), signals.leaving_at_once():
        settings = asdict(question)
        name = finding_name("find-lr", config, runs_dir, settings)
        header = f"find-lr {typed.target.label}: {len(lrs)} steps from lr {lrs[0]:g} to {lrs[-1]:g}"
        with Display(header, len(lrs), terminal=sys.stdout.isatty() and not json, json=json) as display:
            data = prepare(config, cache_dir(runs_dir), progress=display.packing)
            check_model(config, data.tokenizer.vocab_size)
            display.status("opening MLflow")
            store = _store(runs_dir)
            display.status("building the model")
            curve = _test(config, runs_dir, lrs, display)
            display.status("drawing the curve")
            found, trouble = _suggestion(curve)
            result = _result(typed, name, settings, curve, found, trouble, time.monotonic() - started)
            folder = finding_folder(runs_dir, name)
            _keep(folder, result, curve, found, f"{config.preset}: learning-rate range test")
            display.status("telling MLflow")
            run_id, where = log_finding(store, _finding(name, folder, config, settings, curve, found))
    result |= {"folder": str(folder), "mlflow_run_id": run_id}
    print_json(result) if json else _show(result, curve, found, where)
    if trouble is not None:
        raise trouble
    return 0


def _store(runs_dir: Path) -> Store:
    """Before the test: a store that cannot be used is better known now."""
    from orchestrator.tracking import open_store

    return open_store(runs_dir)


def _test(config: RunConfig, runs_dir: Path, lrs: tuple[float, ...], display: Display) -> LrCurve:
    from trainers.range_test import range_test
    from trainers.scratch import scratch_run

    def on_step(step: int, lr: float, loss: float) -> None:
        display.row({"step": step, "phase": "range test", "train/loss": loss, "train/lr": lr})

    with scratch_run(config, cache_dir(runs_dir)) as (run, phase):
        return range_test(run, phase, lrs, on_step=on_step)


def _suggestion(curve: LrCurve) -> tuple[LrSuggestion | None, NoSuggestion | None]:
    try:
        return suggest(curve), None
    except NoSuggestion as trouble:
        return None, trouble


# ---- what is kept and shown ------------------------------------------------------------------------------


def _result(
    typed: Typed,
    name: str,
    settings: Mapping[str, Any],
    curve: LrCurve,
    found: LrSuggestion | None,
    trouble: NoSuggestion | None,
    seconds: float,
) -> dict[str, Any]:
    return {
        "kind": "find-lr",
        "name": name,
        "preset": typed.target.config.preset,
        "settings": dict(settings),
        "suggestion": found.to_json() if found else None,
        "rule": RULE if found else str(trouble),
        "path": lr_path(typed.target.config),
        "commands": commands(typed, found) if found else {},
        "notes": list(_notes(typed.target.config, curve, found)),
        "seconds": round(seconds, 1),
        "curve": curve.to_json(),
    }


RULE = (
    "suggested is the rate where the smoothed loss falls fastest; a tenth of the rate where it is lowest is the more "
    "careful mark; the band goes from a third of the smaller mark to three times the larger, at most to the "
    "lowest point"
)


def commands(typed: Typed, found: LrSuggestion) -> dict[str, str]:
    """To paste: the training with the suggested rate, and a sweep over the band."""
    path = lr_path(typed.target.config)
    low, high = found.band
    return {
        "train": typed.command("train", f"{path}={found.suggested:.2g}", without=[path]),
        "tune": typed.command("tune", "--set-space", f"{path}=log({low:.2g},{high:.2g})", without=[path]),
    }


def _notes(config: RunConfig, curve: LrCurve, found: LrSuggestion | None) -> list[str]:
    notes = []
    if found is not None and found.still_falling:
        notes.append(f"the loss was still falling at lr {curve.lrs[-1]:.2g}: raise --to to see its minimum")
    if len(config.phases) > 1:
        notes.append(f"tested is the first phase, {config.phases[0].name}; the others start from other weights")
    return notes


def _keep(folder: Path, result: Mapping[str, Any], curve: LrCurve, found: LrSuggestion | None, title: str) -> None:
    from orchestrator.finder_plots import plot_lr_curve

    with whole_folder(folder) as draft:
        write_json(draft / RESULT, result)
        plot_lr_curve(curve, found, draft / PLOT, title)


def _finding(
    name: str, folder: Path, config: RunConfig, settings: Mapping[str, Any], curve: LrCurve, found: LrSuggestion | None
) -> Finding:
    points = zip(curve.lrs, curve.losses, curve.smoothed, strict=True)
    rows = [
        {"step": step, "train/lr": lr, "train/loss": loss, "find/smoothed_loss": smooth}
        for step, (lr, loss, smooth) in enumerate(points, start=1)
    ]
    marks = ("suggested", "steepest", "minimum", "minimum_tenth")
    tags = {f"find.{mark}": f"{getattr(found, mark):.4g}" for mark in marks} if found else {}
    state: EndState = "FINISHED" if found else "FAILED"
    return Finding("find-lr", name, folder, config, settings, rows, tags, state, curve.ended)


def _show(result: Mapping[str, Any], curve: LrCurve, found: LrSuggestion | None, where: str) -> None:
    rows: list[tuple[str, str]] = []
    if found is not None:
        low, high = found.band
        rows += [
            ("suggested lr", f"{found.suggested:.2g}: the point of steepest descent"),
            ("more careful", f"{found.minimum_tenth:.2g}: a tenth of {found.minimum:.2g}, where the loss is lowest"),
            ("band for a sweep", f"{low:.2g} to {high:.2g}"),
        ]
    rows.append(("test ended", _ending(curve)))
    rows += [("note", note) for note in result["notes"]]
    out().print(pairs([(name, Text(value)) for name, value in rows]))
    show_way_on(result, f"{result['folder']}/{PLOT}", where)


def _ending(curve: LrCurve) -> str:
    n = len(curve.losses)
    if curve.ended == "completed":
        return f"after all {n} steps, without diverging"
    if curve.ended == "stopped":
        return f"after {n} steps: {curve.why}"
    what = "the loss diverged" if curve.ended == "diverged" else "the loss or a gradient was not finite"
    return f"after {n} steps: {what}" + (f" at lr {curve.ended_at:.2g}" if curve.ended_at else " before any update")
