"""tune."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.verbs import options

if TYPE_CHECKING:
    from orchestrator.sweeps.sweep import SweepRequest
    from search_spaces.space import Space
    from trainers.config import RunConfig

DEFAULT_TRIALS = 16
DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


@dataclass(frozen=True)
class SpaceOptions:
    """What is searched."""

    space: Annotated[
        str | None,
        typer.Option(
            "--space",
            metavar="NAME|FILE.yaml",
            help="What to search: a catalogued space or your own.",
            show_default="lr, unless --set-space",
        ),
    ] = None
    set_space: Annotated[
        list[str] | None,
        typer.Option(
            "--set-space",
            metavar="PATH=DOMAIN",
            help="An axis: 'optim.lr=log(1e-5,1e-3)', "
            "'batch.sequences=[8,16]'. Repeatable; joins or overrides --space.",
            show_default=False,
        ),
    ] = None


@dataclass(frozen=True)
class SearchOptions:
    """How it is searched: what makes it this sweep, beside the space."""

    trials: Annotated[
        int | None, typer.Option("--trials", metavar="N", help="Points to try.", show_default="16; a grid: all cells")
    ] = None
    searcher: Annotated[
        Literal["grid", "random", "tpe", "multi"],
        typer.Option(
            "--searcher", help="Who proposes points: a grid, chance, Optuna's TPE, or TPE on several objectives."
        ),
    ] = "tpe"
    scheduler: Annotated[
        Literal["none", "asha", "hyperband", "median", "pbt"] | None,
        typer.Option(
            "--scheduler",
            help="Who stops bad trials early (pbt: who changes them as they train).",
            show_default="asha; none where shares of phases are searched",
        ),
    ] = None
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Trainings of each point: noise bars.")] = 1
    objective: Annotated[
        list[str] | None,
        typer.Option(
            "--objective",
            metavar="METRIC[:max]",
            help="What is best; several with --searcher multi.",
            show_default="val/loss",
        ),
    ] = None
    lr_rule: Annotated[
        Literal["none", "linear", "sqrt"],
        typer.Option("--lr-rule", help="Tie the learning rate to the batch size (it is then the base batch's)."),
    ] = "none"
    search_seed: Annotated[int, typer.Option("--search-seed", metavar="N", help="Of the searcher.")] = 0
    grid_points: Annotated[
        int, typer.Option("--grid-points", metavar="N", help="Grid: values of each continuous axis.")
    ] = 3
    evaluations: Annotated[
        int, typer.Option("--evaluations", metavar="N", help="Of each training, evenly spaced in tokens.")
    ] = 9
    reduction: Annotated[
        int, typer.Option("--reduction", metavar="N", help="asha, hyperband: one of so many goes on from a rung.")
    ] = 3
    grace: Annotated[
        int | None,
        typer.Option(
            "--grace", metavar="TOKENS", help="No trial is stopped before.", show_default="the first evaluation"
        ),
    ] = None
    cpus_per_trial: Annotated[int, typer.Option("--cpus-per-trial", metavar="N", help="Threads of a worker.")] = 1

    def draft(self, space: Space, space_name: str) -> dict[str, Any]:
        """The settings of the sweep, without what the text says. Raises UserError."""
        from orchestrator.sweeps.rules import default_scheduler
        from orchestrator.sweeps.searchers import MOST_CELLS, grid_cells
        from trainers.errors import UserError

        if self.trials is not None:
            _refuse_below_1("trials", self.trials)
        if self.grid_points > MOST_CELLS:
            raise UserError(f"--grid-points must be at most {MOST_CELLS:,}, got {self.grid_points}.")
        cells = grid_cells(space, self.grid_points) if self.searcher == "grid" else DEFAULT_TRIALS
        if cells > MOST_CELLS and self.trials is None:
            raise UserError(
                f"the grid has more than {MOST_CELLS:,} cells, which no sweep trains: lower --grid-points "
                f"{self.grid_points}, search fewer axes, or take --searcher random with --trials."
            )
        return {
            "space_name": space_name,
            "searcher": self.searcher,
            "scheduler": self.scheduler or default_scheduler(space),
            "trials": self.trials or cells,
            "grid_points": self.grid_points,
            "seeds": self.seeds,
            "seed": self.search_seed,
            "objectives": tuple(_objective(text) for text in self.objective or ["val/loss"]),
            "evaluations": self.evaluations,
            "reduction": self.reduction,
            "grace": self.grace,
            "lr_rule": self.lr_rule,
            "cpus_per_trial": self.cpus_per_trial,
        }


@dataclass(frozen=True)
class LimitOptions:
    """Where and for how long, which changes nothing that the sweep finds."""

    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Name of the sweep.", show_default="preset + space + fingerprint"),
    ] = None
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(
            "--gpus-per-trial",
            metavar="X",
            help="0.25: four trials share a GPU.",
            show_default="1 where there are GPUs",
        ),
    ] = None
    concurrent: Annotated[
        int | None, typer.Option("--concurrent", metavar="N", help="Trials at a time.", show_default="all that fit")
    ] = None
    max_time: Annotated[
        str | None,
        typer.Option(
            "--max-time", metavar="90m", help="Stop the sweep after so long; it can go on later.", show_default=False
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", metavar="N", help="... after so many tokens over all trials.", show_default=False),
    ] = None
    max_gpu_hours: Annotated[
        float | None,
        typer.Option("--max-gpu-hours", metavar="X", help="... after so many GPU-hours.", show_default=False),
    ] = None
    memory_limit: Annotated[
        str | None,
        typer.Option(
            "--memory-limit",
            metavar="SIZE",
            help="Memory that each worker of a trial may take, such as 4GiB: what cannot fit is left out, on a cluster "
            "too.",
            show_default="its part of what this machine has",
        ),
    ] = None
    then_train: Annotated[
        bool, typer.Option("--then-train", help="Train the winner at the preset's or file's own budget afterwards.")
    ] = False
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew as NAME-2 beside a sweep of that name.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's own log lines too.")] = False
    json: options.Json = False

    def request(self, runs_dir: Path, own: RunConfig, typed_runs_dir: Path | None = None) -> SweepRequest:
        """What they ask for in that folder. `own`: the target before the command line's settings. Raises UserError."""
        from orchestrator.experiment import confined
        from orchestrator.memory_limit import parse_size
        from orchestrator.sweeps.sweep import SweepRequest
        from trainers.errors import UserError

        if self.name is not None:
            confined(runs_dir, self.name)
        for option, count in (("concurrent", self.concurrent), ("max-tokens", self.max_tokens)):
            if count is not None:
                _refuse_below_1(option, count)
        for option, amount in (("gpus-per-trial", self.gpus_per_trial), ("max-gpu-hours", self.max_gpu_hours)):
            if amount is not None and not 0 < amount < float("inf"):
                raise UserError(f"--{option} must be above 0, got {amount:g}.")
        return SweepRequest(
            runs_dir=runs_dir,
            typed_runs_dir=typed_runs_dir,
            name=self.name,
            concurrent=self.concurrent,
            gpus_per_trial=self.gpus_per_trial,
            max_seconds=None if self.max_time is None else seconds_of(self.max_time),
            max_tokens=self.max_tokens,
            max_gpu_hours=self.max_gpu_hours,
            then_train=own if self.then_train else None,
            fresh=self.fresh,
            verbose=self.verbose,
            json=self.json,
            memory_limit=None if self.memory_limit is None else parse_size(self.memory_limit, "--memory-limit"),
        )


@options.spread
def tune(
    target: options.TargetOptions,
    searched: SpaceOptions,
    search: SearchOptions,
    limits: LimitOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would do: trials, tokens, time. Leaves nothing behind.")
    ] = False,
) -> int:
    """Search learning rate, batch size, precision or any setting; ends with the command that uses the best.

    [bold]Examples[/bold]

      orchestrate tune fundamentallm/small --space lr_batch --trials 16 budget.steps=300
      orchestrate tune codelm/tiny --space lr --searcher grid --scheduler none --seeds 3
      orchestrate tune mine.yaml --set-space 'optim.lr=log(1e-4,1e-2)' --set-space 'model.dropout=[0,0.1,0.2]'
      orchestrate tune fundamentallm/small --space lr_batch_precision --max-time 30m --then-train

    Trials train on equal tokens, whatever their batch size: budget.steps counts steps of the base batch.
    The same command goes on where it was stopped. `orchestrate report NAME` shows what was found.
    The catalogued spaces: lr, lr_batch, lr_batch_precision, regularisation, schedule, depth_width, task_weights,
    phase_lengths. Exit codes: 0 done, 2 bad input, 3 no trial could train, 75 stopped and resumable.
    """
    from orchestrator.runs import check_runs_dir
    from orchestrator.sweeps.slots import check_fits_here, device_of
    from trainers.errors import UserError

    chosen = target.resolve()
    request = limits.request(target.runs_dir.absolute(), chosen.loaded or chosen.config, target.typed_runs_dir)
    device = device_of(chosen.config, request)
    if device == "cpu" and limits.max_gpu_hours is not None:
        raise UserError(
            f"--max-gpu-hours {limits.max_gpu_hours:g} would bound nothing: these trials train on the CPU. Say "
            "--max-time or --max-tokens."
        )
    space, draft, taken_out = sought(chosen.config, searched, search, device, then_train=limits.then_train)
    check_fits_here(chosen.config.workers, search.cpus_per_trial)
    if not dry_run:
        check_runs_dir(request.runs_dir)
    from orchestrator.sweeps import driver, rehearsal

    run = rehearsal.rehearse if dry_run else driver.tune
    return run(chosen.config, draft, space, device, request, taken_out)


def sought(
    config: RunConfig,
    searched: SpaceOptions,
    search: SearchOptions,
    device: Any,
    *,
    then_train: bool = False,
    packages: bool = True,
) -> tuple[Space, dict[str, Any], tuple[tuple[str, str], ...]]:
    """The space, the settings without what the text says, and the cells taken out with their reasons.

    Raises UserError for all that can be told to be wrong without the text; `packages` as for `search_spaces.check`.
    """
    from orchestrator.sweeps.population import check_population
    from orchestrator.sweeps.rules import check_rule
    from orchestrator.sweeps.settings import MOST_TOKENS, build_settings
    from orchestrator.sweeps.winner import check_can_train
    from trainers.errors import UserError

    space, name, taken_out = space_of(config, searched.space, searched.set_space or [], device, packages=packages)
    draft = search.draft(space, name)
    settings = build_settings(draft, space.to_json(), tokens=MOST_TOKENS)
    check_rule(space, settings.scheduler)
    if settings.lr_rule != "none" and "batch.sequences" not in space:
        raise UserError(
            f"--lr-rule {settings.lr_rule} lets the learning rate follow batch.sequences, and this space does not "
            "search it: leave --lr-rule out, or add an axis such as --set-space 'batch.sequences=[8,16]'."
        )
    if settings.scheduler == "pbt":
        check_population(space, settings, config.workers)
    if then_train:
        check_can_train(settings.scheduler)
    return space, draft, taken_out


def _refuse_below_1(option: str, count: int) -> None:
    from trainers.errors import UserError

    if count < 1:
        raise UserError(f"--{option} must be at least 1, got {count}.")


def space_of(
    config: RunConfig, named: str | None, typed: list[str], device: Any, *, packages: bool = True
) -> tuple[Space, str, tuple[tuple[str, str], ...]]:
    """The space that --space and --set-space mean, checked; its name; the cells taken out with their reasons."""
    from search_spaces.catalog import catalogued
    from search_spaces.check import check
    from search_spaces.grammar import parse_assignment
    from search_spaces.space import Space

    found, name = Space(()), "custom"
    taken_out: tuple[tuple[str, str], ...] = ()
    if named is None and not typed:
        named = "lr"
    if named is not None and _is_file(named):
        found = _read_space(named)
    elif named is not None:
        entry = catalogued(named, config, device)
        found, name = entry.space, named
        taken_out = tuple((each.cell, each.reason) for each in entry.taken_out)
    axes = Space(tuple(parse_assignment(text) for text in typed))  # refuses a path that is given twice
    for axis in axes.axes:
        found = found.with_axis(axis)
    check(found, config, device, packages=packages)
    return found, name, taken_out


def _is_file(named: str) -> bool:
    from search_spaces.catalog import CATALOG

    return (
        named.endswith((".yaml", ".yml")) or os.path.isfile(named) or (named not in CATALOG and os.path.exists(named))
    )


def _read_space(path: str) -> Space:
    from search_spaces.catalog import CATALOG
    from search_spaces.grammar import load_space
    from trainers.errors import ConfigError, UserError

    way_out = f"Name a YAML file, or a catalogued space: {', '.join(CATALOG)}."
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for, a device read for ever
        raise UserError(f"--space {path} is {'a folder' if os.path.isdir(path) else 'no regular file'}. {way_out}")
    try:
        return load_space(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--space {path}: {error.strerror}. {way_out}") from None
    except UnicodeDecodeError:
        raise UserError(f"--space {path} is not UTF-8 text: save it as UTF-8.") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _objective(text: str) -> dict[str, str]:
    metric, colon, mode = text.partition(":")
    higher = metric in ("val/accuracy", "perf/tokens_per_s")
    return {"metric": metric, "mode": mode if colon else "max" if higher else "min"}


def seconds_of(text: str) -> float:
    """`90m`, `1h30m`, `45s` or a plain count of seconds. Raises UserError."""
    from trainers.errors import UserError

    found = DURATION.fullmatch(text.strip())
    parts = [float(part or 0) for part in found.groups()] if found else []
    if not parts or not 0 < sum(parts) < float("inf"):
        raise UserError(f"--max-time is a time such as 45s, 90m or 1h30m, got {text!r}.")
    return parts[0] * 3600 + parts[1] * 60 + parts[2]
