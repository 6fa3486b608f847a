"""Reads a sweep out of the MLflow store. What is missing or torn there becomes empty and a note, never an error."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orchestrator.runs import is_run, name_in, run_folder, suggestion
from orchestrator.sweeps.results import Curve, PointResult, SweepResults, TrialResult
from orchestrator.sweeps.settings import Objective
from orchestrator.tracked import StoredRun, children_of, existing_store, is_tracked, metric_history, runs_of_kind
from orchestrator.tracking import STOP_REASON, Store
from search_spaces.trial import PRECISION
from trainers.errors import UserError

NUMBER = re.compile(r"t(\d+)(?:-s\d+)?")
ENDINGS = {"FINISHED": "completed", "KILLED": "user", "FAILED": "error"}
"""of a trial that says nothing more"""
BEYOND = 1e300
STATES = {"RUNNING": "running", "SCHEDULED": "running", "FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}


def read_sweep(runs_dir: Path, name: str) -> SweepResults:
    """The sweep `name`, or a path to its folder, from the store of the runs folder; of several the one begun last.

    Raises UserError for a name that is no sweep, naming those there are, and where the store is away.
    """
    name = name_in(runs_dir, name)
    folder = run_folder(runs_dir, name)
    store = existing_store(runs_dir)
    sweeps = runs_of_kind(store, "sweep") if store else []
    found = next((sweep for sweep in sweeps if sweep.name == name), None)
    if store is not None and found is not None:
        return results_of(store, found)
    if is_run(folder):
        raise UserError(f"{name} is a run and no sweep: `orchestrate status {name}` shows it.")
    if store is not None and is_tracked(store, name):
        raise UserError(f"{name} is a run in the MLflow store and no sweep.{_there_are(sweeps, '')}")
    raise UserError(f"there is no sweep {name!r} in the MLflow store of {runs_dir}.{_there_are(sweeps, name)}")


def _there_are(sweeps: list[StoredRun], name: str) -> str:
    known = list(dict.fromkeys(sweep.name for sweep in sweeps))
    return suggestion(name, known) or " There are no sweeps. Start one: orchestrate tune PRESET --name NAME."


def results_of(store: Store, sweep: StoredRun) -> SweepResults:
    """The results of a sweep that is known by its parent run."""
    tags, metrics, notes = sweep.tags, sweep.metrics, list[str]()
    settings = _json(tags, "sweep.settings", dict, notes)
    objectives = _objectives(settings, notes)
    if not settings:
        notes.append("MLflow has no settings of this sweep: val/loss, less is better, is assumed.")
    trials = [_trial(store, run, objectives[0].metric, notes) for run in children_of(store, sweep) if _is_trial(run)]
    points = _points(trials)
    finite = {name: value for name, value in metrics.items() if _is_known(value)}
    best = NUMBER.fullmatch(tags.get("sweep.best", ""))
    return SweepResults(
        name=sweep.name,
        state=STATES.get(sweep.status, "running"),
        points=points,
        objectives=objectives,
        settings=settings,
        preset=tags.get("preset", ""),
        stop_reason=tags.get(STOP_REASON, ""),
        best=int(best[1]) if best else None,
        command=tags.get("sweep.command", ""),
        lineage=tags.get("sweep.lineage", ""),
        taken_out=_pairs(_json(tags, "sweep.taken_out", list, notes)),
        slots=max(1, _whole(tags.get("sweep.slots"), 1)),
        wall_s=finite.get("sweep/wall_s", (sweep.end_s or time.time()) - sweep.start_s),
        train_s=finite.get("sweep/train_s", sum(trial.train_s for trial in trials)),
        tokens=int(finite.get("sweep/tokens", sum(trial.tokens for trial in trials))),
        notes=tuple(dict.fromkeys(notes)),
    )


def _is_trial(run: StoredRun) -> bool:
    return run.tags.get("kind") == "trial" and "phase" not in run.tags


def _points(trials: list[TrialResult]) -> tuple[PointResult, ...]:
    by_number: dict[int, dict[int, TrialResult]] = defaultdict(dict)
    for trial in trials:
        known = by_number[trial.point].get(trial.seed_index)
        if known is None or known.segment < trial.segment:  # a member of a population counts as it ended
            by_number[trial.point][trial.seed_index] = trial
    return tuple(
        PointResult(number, tuple(seeds[index] for index in sorted(seeds)))
        for number, seeds in sorted(by_number.items())
    )


def _trial(store: Store, run: StoredRun, metric: str, notes: list[str]) -> TrialResult:
    tags, metrics = run.tags, run.metrics
    name = tags.get("trial", run.name)
    number = NUMBER.fullmatch(name)
    config, params = _current(run), _json(tags, "trial.params", dict, notes)
    rates = [rate for _, rate in _history(store, run, "perf/tokens_per_s") if _is_known(rate)]
    return TrialResult(
        name=name,
        point=_whole(tags.get("trial.point"), int(number[1]) if number else -1),
        seed_index=_whole(tags.get("trial.seed_index"), 0),
        segment=_whole(tags.get("trial.segment"), 0),
        state=_state(run),
        params=params,
        config=config,
        objectives=_told(metrics),
        curve=_curve(store, run, metric),
        tokens=int(_finite(metrics.get("tokens"), 0.0)),
        tokens_per_s=statistics.median(rates) if rates else math.nan,
        peak_gib=_finite(metrics.get("mem/peak_gib"), math.nan),
        train_s=_finite(metrics.get("sweep/train_s"), 0.0),
        end_s=run.end_s,
        precision=str(params.get(PRECISION) or tags.get("precision") or config.get("precision.compute", "")),
        run_id=run.run_id,
        run_path=tags.get("run_path", ""),
    )


def _current(run: StoredRun) -> dict[str, str]:
    """The configuration with the values that changed after the run began (population based training)."""
    changed = {key.removeprefix("param_update."): value for key, value in run.tags.items() if "param_update." in key}
    return {**run.params, **changed}


def _state(run: StoredRun) -> str:
    if run.status == "SCHEDULED":
        return "waiting"
    return run.tags.get(STOP_REASON) or ENDINGS.get(run.status, "completed") if run.ended else "running"


def _told(metrics: Mapping[str, float]) -> tuple[float, ...]:
    names = ["sweep/objective"]
    while f"sweep/objective_{len(names)}" in metrics:
        names.append(f"sweep/objective_{len(names)}")
    values = tuple(metrics.get(name, math.nan) for name in names)
    return values if all(map(_is_known, values)) else ()


def _curve(store: Store, run: StoredRun, metric: str) -> Curve:
    """The metric by tokens, as logged so; else joined from its steps and the tokens logged at them."""
    by_tokens = _history(store, run, f"by_tokens/{metric}")
    if not by_tokens and metric in run.metrics:
        tokens = dict(_history(store, run, "tokens"))
        by_tokens = [(int(tokens[step]), value) for step, value in _history(store, run, metric) if step in tokens]
    return tuple((at, value) for at, value in by_tokens if _is_known(value))


def _history(store: Store, run: StoredRun, name: str) -> list[tuple[int, float]]:
    return metric_history(store, run.run_id, name) if name in run.metrics else []


def _objectives(settings: Mapping[str, Any], notes: list[str]) -> tuple[Objective, ...]:
    try:
        return TypeAdapter(tuple[Objective, ...]).validate_python(settings["objectives"]) or (Objective(),)
    except KeyError:
        return (Objective(),)
    except ValidationError:
        notes.append("The sweep's objectives in MLflow cannot be read: val/loss, less is better, is assumed.")
        return (Objective(),)


def _json(tags: Mapping[str, str], name: str, kind: type, notes: list[str]) -> Any:
    """A tag's JSON value of that kind; an empty one where it is missing, and a note where it is torn."""
    if name not in tags:
        return kind()
    try:
        value = json.loads(tags[name])
    except ValueError:  # a tag longer than MLflow takes was cut
        value = None
    if isinstance(value, kind):
        return value
    notes.append(f"The tag {name} in MLflow cannot be read.")
    return kind()


def _pairs(items: list[Any]) -> tuple[tuple[str, str], ...]:
    return tuple((str(item[0]), str(item[1])) for item in items if isinstance(item, list) and len(item) == 2)


def _whole(text: str | None, default: int) -> int:
    return int(text) if text is not None and re.fullmatch(r"\d+", text) else default


def _finite(value: float | None, default: float) -> float:
    return value if value is not None and _is_known(value) else default


def _is_known(value: float) -> bool:
    """Finite, and not so large that no axis could be drawn to it: the perplexity of a loss that diverges."""
    return abs(value) < BEYOND
