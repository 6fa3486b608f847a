"""train, plan, show, presets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.verbs import options

if TYPE_CHECKING:
    from orchestrator.memory_plan import MemoryQuestion
    from orchestrator.target import Target


@options.spread
def train(
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Name of the run.", show_default="preset + fingerprint"),
    ] = None,
    *,
    target: options.TargetOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would do and leave nothing behind (`orchestrate plan`).")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew as NAME-2 beside a run of that name.")] = False,
    reshape: Annotated[
        bool,
        typer.Option("--reshape", help="Go on with other --workers or another engine than the run began with."),
    ] = False,
    on_oom: Annotated[
        Literal["stop", "shrink"],
        typer.Option(
            "--on-oom",
            help="What running out of memory does: stop with the numbers, or go on from the last checkpoint with half "
            "the micro-batch and twice the accumulation.",
        ),
    ] = "stop",
    memory_limit: Annotated[
        str | None,
        typer.Option(
            "--memory-limit",
            metavar="SIZE",
            help="Memory that each worker may take, such as 8GiB.",
            show_default="whatever there is",
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's own log lines too.")] = False,
    json: options.Json = False,
) -> int:
    """Train a language model; the same command goes on where it stopped.

    [bold]Examples[/bold]

      orchestrate train fundamentallm/small --name first-run
      orchestrate train fundamentallm/small --data book.txt budget.epochs=3
      orchestrate train codelm/tiny optim.lr=1e-3 batch.sequences=16
      orchestrate train mine.yaml --workers 2 --precision bf16
      orchestrate train codelm/tiny --precision int8 --on-oom shrink
      orchestrate train first-run --name tuned --precision int4 --init-from first-run --data notes.txt
      orchestrate train codelm/tiny --workers 2 engine=deepspeed deepspeed.zero_stage=3   (or parallel=fsdp)
      orchestrate train first-run                    (goes on with it)
      orchestrate train first-run budget.epochs=+1   (a finished run: longer)

    Ctrl-C saves a checkpoint and stops.
    Exit codes: 0 done, 1 internal error, 2 bad input, 3 training failed, 75 stopped and resumable.
    """
    if dry_run:
        return _plan(target, json, name)
    from orchestrator.experiment import Request, confined
    from orchestrator.memory_limit import parse_size
    from orchestrator.runs import check_runs_dir

    meant = target.resolve()
    request = Request(
        runs_dir=target.runs_dir.absolute(),
        name=meant.label if meant.kind == "run" and name is None else name,
        fresh=fresh,
        reshape=reshape,
        verbose=verbose,
        json=json,
        memory_limit=None if memory_limit is None else parse_size(memory_limit, "--memory-limit"),
        shrinks=on_oom == "shrink",
    )
    if request.name is not None:
        confined(request.runs_dir, request.name)
    check_runs_dir(request.runs_dir)
    _say_notes(meant)
    from orchestrator.launch import train as launch

    return launch(meant.config, request)


@options.spread
def plan(
    *,
    target: options.TargetOptions,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", metavar="N", help="Plan for so many GPUs, one worker each.", show_default=False),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory",
            metavar="SIZE|CARD",
            help="Plan for a GPU with so much memory, such as 24GiB, or for a card by name (rtx4090, a100-80, h100).",
            show_default="what is here",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="ROWS,...", help="Micro-batches to show.", show_default="the configured one"),
    ] = None,
    variants: Annotated[
        bool, typer.Option("--variants", help="Other precisions, recompute and ZeRO stages too (so with --gpu-memory).")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Memory of every preset (or of the one named) in each precision.")
    ] = False,
    json: options.Json = False,
) -> int:
    """Say what `train` would do: parameters, tokens, steps, memory, checkpoints, disk, and time where it is known.

    Opens the data (a sample of big files), trains nothing, starts nothing, leaves nothing behind. Memory is predicted
    by component, and the largest batch that fits is named: on this machine, or on GPUs that need not be here.

    [bold]Examples[/bold]

      orchestrate plan fundamentallm/medium --data book.txt
      orchestrate plan codelm/large batch.sequences=64 --json
      orchestrate plan codelm/xlarge --gpus 1 --gpu-memory 24GiB --batch 1,2,4
      orchestrate plan genesis/deep_narrow_48 --gpus 4 --gpu-memory a100-40
      orchestrate plan --table --gpu-memory rtx4090
    """
    from orchestrator.memory_plan import MemoryQuestion
    from orchestrator.memory_plan import rows_of as rows_typed

    elsewhere = gpus is not None or gpu_memory is not None
    question = MemoryQuestion(gpus, gpu_memory, rows_typed(batch), variants or elsewhere or batch is not None)
    question.check()
    if table:
        return _table(target, question, json)
    return _plan(target, json, None, question)


@options.spread
def show(*, target: options.TargetOptions, json: options.Json = False) -> int:
    """Check a configuration and print it whole, as YAML that `train` accepts. Opens no data.

    [bold]Examples[/bold]

      orchestrate show codelm/large > mine.yaml
      orchestrate show fundamentallm/small model.dropout=0
      orchestrate show first-run                     (what a run is made of)
    """
    import sys

    from orchestrator.console import print_json
    from trainers.config_io import dump_yaml

    meant = target.resolve()
    if json:
        print_json(meant.config.model_dump(mode="json"))
    else:
        _say_notes(meant)
        sys.stdout.write(dump_yaml(meant.config))
    return 0


def presets(json: options.Json = False) -> int:
    """List the presets: configurations that come along, to train as they are or to start from.

    [bold]Examples[/bold]

      orchestrate presets
      orchestrate show fundamentallm/small           (all that one of them sets)
      orchestrate train fundamentallm/small optim.lr=1e-3
    """
    from orchestrator.console import out, print_json
    from orchestrator.presets_table import preset_rows, presets_table

    rows = preset_rows()
    if json:
        print_json(rows)
        return 0
    console = out()
    console.print(presets_table(rows))
    console.print(
        "\nSee all of one: orchestrate show NAME.  Train it: orchestrate train NAME --name my-run", soft_wrap=True
    )
    return 0


def _plan(target: options.TargetOptions, json: bool, name: str | None, question: MemoryQuestion | None = None) -> int:
    from orchestrator.console import out, print_json
    from orchestrator.experiment import confined, refuse_sweep
    from orchestrator.memory_plan import MemoryQuestion
    from orchestrator.survey_plan import plan_json, plan_tables, survey_plan

    meant = target.resolve()
    runs_dir = target.runs_dir.absolute()
    if name is not None:
        refuse_sweep(confined(runs_dir, name))
    report = survey_plan(meant.config, runs_dir, question or MemoryQuestion())
    if json:
        print_json(plan_json(report))
        return 0
    _say_notes(meant)
    console = out()
    for part in plan_tables(report):
        console.print(part)
    return 0


def _table(target: options.TargetOptions, question: MemoryQuestion, json: bool) -> int:
    from orchestrator.console import out, print_json
    from orchestrator.experiment import cache_dir
    from orchestrator.preset_memory import preset_memory, preset_memory_table, table_notes

    named = target.resolve().config if target.settings else None
    found = preset_memory(named, question, cache_dir(target.runs_dir.absolute()))
    if json:
        print_json(found.to_json())
        return 0
    console = out()
    console.print(preset_memory_table(found))
    for note in table_notes(found):
        console.print(f"- {note}")
    return 0


def _say_notes(meant: Target) -> None:
    """What a person should know goes to standard error: standard output may be a file."""
    from rich.text import Text

    from orchestrator.console import err

    for note in meant.notes:
        err().print(Text(note, style="yellow"), soft_wrap=True)
