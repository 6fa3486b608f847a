"""Checked: a command line that this machine finds nothing wrong with, although it is to run on another.

Nothing is started and no data is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from orchestrator.verbs.options import TargetOptions, sentence
from trainers.errors import UserError

if TYPE_CHECKING:
    from orchestrator.target import Target
    from trainers.config import RunConfig

Options = TypeVar("Options")
NO_RUNS_HERE = Path(os.devnull) / "runs"  # the runs folder is the cluster's: no run of this machine is meant


@dataclass(frozen=True)
class Checked:
    """A command that this machine finds nothing wrong with."""

    argv: tuple[str, ...]
    target: Target | None
    files: tuple[str, ...]
    """that it reads besides the target's"""
    takes_runs_dir: bool
    """and does not name one itself"""

    @property
    def verb(self) -> str:
        return self.argv[0]


def check(command: list[str]) -> Checked:
    """Parse a command as the command line would, and build what it means, without running it. Raises UserError."""
    from orchestrator.cli import app

    argv = command[1:] if command[0] == "orchestrate" else command
    if not argv:
        raise UserError("say what to run, after --, such as `-- train codelm/tiny --name a`; got `orchestrate` alone.")
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    try:
        with group.make_context("orchestrate", list(argv)) as outer:
            name, verb, rest = group.resolve_command(outer, list(argv))
            assert name is not None and verb is not None
            if name == "submit":
                raise UserError("a job cannot submit another: name the verb to run, such as train.")
            with verb.make_context(name, rest, parent=outer) as context:
                parameters = dict(context.params)
                source = context.get_parameter_source("runs_dir")
    except typer.TyperException as error:
        known = argv[0] in group.commands
        way_out = (
            f"`orchestrate {argv[0]} --help` shows how it is used."
            if known
            else f"The verbs: {', '.join(group.commands)}."
        )
        raise UserError(f"{sentence(error)} {way_out}") from None
    named = source is not None and source.name == "COMMANDLINE"
    if named and not parameters["runs_dir"].is_absolute():
        raise UserError(
            f"--runs-dir {parameters['runs_dir']} would lie in the job's working directory and be lost with it: give "
            "the full path of a folder on a disk that every node of the cluster sees."
        )
    parameters["runs_dir"] = parameters["runs_dir"] if named else NO_RUNS_HERE
    target = _check_target(name, parameters) if "settings" in parameters else None
    files = CHECKS[name](parameters, target.config) if target is not None and name in CHECKS else ()
    return Checked(tuple(argv), target, files, source is not None and not named)


def _check_target(verb: str, parameters: Mapping[str, Any]) -> Target:
    """The configuration that the command means, as `orchestrate show` builds it."""
    from orchestrator.experiment import confined
    from orchestrator.runs import is_run, suggestion
    from orchestrator.target import split
    from trainers.presets import PRESETS

    options = _given(parameters, TargetOptions)
    if verb == "bench":  # several, of its cells
        options = replace(options, precision=None)
    label, typed = split(list(options.settings or ()))
    if options.init_from is not None:  # a run of the cluster, which cannot be seen from here
        there = f"init_from={json.dumps(options.init_from)}"
        options = replace(options, init_from=None, settings=[label, *typed, there])
    if label not in PRESETS and not os.path.isfile(label) and not is_run(options.runs_dir / label):
        raise UserError(
            f"{label[:60]!r} is no preset and no file of the working directory.{suggestion(label, sorted(PRESETS))} "
            "To go on with a run of the cluster, repeat the command that began it, with its --name."
        )
    if parameters.get("name") is not None:
        confined(options.runs_dir, parameters["name"])
    return options.resolve()


def _given(parameters: Mapping[str, Any], noun: type[Options]) -> Options:
    return noun(**{option.name: parameters[option.name] for option in fields(noun)})  # type: ignore[arg-type]


def _check_sweep(parameters: Mapping[str, Any], config: RunConfig) -> tuple[str, ...]:
    """The space that a sweep searches, and how. What the cluster computes on and has installed is not known here: a GPU
    can do the most."""
    from orchestrator.verbs.sweeps import LimitOptions, SearchOptions, SpaceOptions, sought

    device = "cuda" if config.device == "auto" else config.device
    searched = _given(parameters, SpaceOptions)
    limits = _given(parameters, LimitOptions)
    limits.request(NO_RUNS_HERE, config)
    search = _given(parameters, SearchOptions)
    sought(config, searched, search, device, then_train=limits.then_train, packages=False)
    named = searched.space
    return (named,) if named is not None and os.path.isfile(named) else ()


def _check_find_lr(parameters: Mapping[str, Any], config: RunConfig) -> tuple[str, ...]:
    from trainers.lr_curve import geometric

    geometric(parameters["low"], parameters["high"], parameters["steps"])
    return ()


def _check_find_batch(parameters: Mapping[str, Any], config: RunConfig) -> tuple[str, ...]:
    from orchestrator.batch_findings import BatchQuestion

    _check_memory_limit(parameters)
    BatchQuestion(parameters["memory_limit"], parameters["most"], parameters["steps"]).check()
    return ()


def _check_bench(parameters: Mapping[str, Any], config: RunConfig) -> tuple[str, ...]:
    from orchestrator.bench import BenchQuestion
    from orchestrator.memory_plan import rows_of

    _check_memory_limit(parameters)
    names = None if parameters["precision"] is None else tuple(parameters["precision"].split(","))
    BenchQuestion(rows_of(parameters["batch"]), names, steps=parameters["steps"]).check()
    return ()


def _check_memory_limit(parameters: Mapping[str, Any]) -> None:
    from orchestrator.memory_limit import parse_size

    if parameters["memory_limit"] is not None:
        parse_size(parameters["memory_limit"], "--memory-limit")


CHECKS: dict[str, Callable[[Mapping[str, Any], RunConfig], tuple[str, ...]]] = {
    "tune": _check_sweep,
    "find-lr": _check_find_lr,
    "find-batch": _check_find_batch,
    "bench": _check_bench,
}
"""verb -> what it means besides its target, checked; returns the files that this reads"""


def refuse_what_stays(checked: Checked, root: Path, travels: Callable[[Path], bool]) -> None:
    """Every file that the command names relative to `root` must travel with it. Raises UserError."""
    if checked.target is None:
        return
    typed = " ".join(checked.argv)
    if checked.target.kind == "file":
        typed += (root / checked.target.label).read_text(encoding="utf-8", errors="replace")
    for name in (*_files_of(checked.target), *checked.files):
        path = Path(os.path.normpath(root / name))
        by_its_full_path = Path(name).is_absolute() and name in typed
        if path.exists() and not by_its_full_path and not travels(path):
            raise UserError(
                f"{os.path.relpath(path, root)} is not sent along: only what lies in the working directory, is not "
                "named by .gitignore or .rayignore, and is no large data. Name it by its full path on a disk that the "
                "cluster sees."
            )


def _files_of(target: Target) -> Iterator[str]:
    """What the target reads: its own file, and the corpora and the tokenizer that are on this disk."""
    if target.kind == "file":
        yield target.label
    corpora = {source.corpus for phase in target.config.resolved_phases() for source in phase.data.sources}
    tokenizer = target.config.tokenizer.path
    yield from sorted(name for name in (*corpora, *([tokenizer] if tokenizer else [])) if os.path.isabs(name))
