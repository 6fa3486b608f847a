"""find-lr, find-batch, bench: what to set before a long training or a sweep, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.verbs import options

if TYPE_CHECKING:
    from orchestrator.finders import Typed

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would do and leave nothing behind.")]


@options.spread
def find_lr(
    *,
    target: options.TargetOptions,
    low: Annotated[float, typer.Option("--from", metavar="LR", help="Learning rate of the first update.")] = 1e-6,
    high: Annotated[float, typer.Option("--to", metavar="LR", help="Learning rate of the last update.")] = 10.0,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Updates, each at a larger rate.")] = 120,
    dry_run: DryRun = False,
    json: options.Json = False,
) -> int:
    """Find a learning rate: train while it grows, and read the rate off the curve of the loss.

    A range test (Smith 2017). It ends when the loss diverges, saves the curve as PNG and JSON below RUNS/.find and in
    MLflow, and prints the commands to train and to sweep with what it found. Needs no Ray.

    [bold]Examples[/bold]

      orchestrate find-lr fundamentallm/small
      orchestrate find-lr codelm/tiny --from 1e-5 --to 1 --steps 200
      orchestrate find-lr fundamentallm/small --init-from first-run --data new.txt

    Exit codes: 0 done, 2 bad input, 3 no rate can be read from the curve, 130 stopped by Ctrl-C.
    """
    from orchestrator.lr_finder import LrQuestion
    from orchestrator.lr_finder import dry_run as say_what_it_would_do
    from orchestrator.lr_finder import find_lr as find

    typed, question = _typed(target), LrQuestion(low, high, steps)
    runs_dir = target.runs_dir.absolute()
    if dry_run:
        return say_what_it_would_do(typed.target.config, question, runs_dir, json=json)
    return find(typed, question, runs_dir, json=json)


@options.spread
def find_batch(
    *,
    target: options.TargetOptions,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            "--memory-limit",
            metavar="SIZE",
            help="Memory of one worker, such as 2GiB.",
            show_default="what is available, less headroom; on a GPU what is free there",
        ),
    ] = None,
    most: Annotated[int, typer.Option("--max", metavar="ROWS", help="Largest micro-batch to try.")] = 256,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Timed steps of each size.")] = 5,
    dry_run: DryRun = False,
    json: options.Json = False,
) -> int:
    """Find the largest micro-batch that fits into memory, and the fastest one: both are measured.

    Each size trains a few real steps in a process of its own. Sizes that would pass the limit by what the smaller
    ones took are not tried on a CPU. The table, a picture and JSON go below RUNS/.find and into MLflow. Needs no Ray.

    [bold]Examples[/bold]

      orchestrate find-batch fundamentallm/small
      orchestrate find-batch codelm/large --memory-limit 8GiB
      orchestrate find-batch codelm/tiny --device cuda --precision bf16 --max 1024

    Exit codes: 0 done, 2 bad input or not even one row fits, 130 stopped by Ctrl-C.
    """
    from orchestrator.batch_findings import BatchQuestion, run
    from orchestrator.batch_findings import dry_run as say_what_it_would_do

    typed, question = _typed(target), BatchQuestion(memory_limit, most, steps)
    runs_dir = target.runs_dir.absolute()
    if dry_run:
        return say_what_it_would_do(typed.target.config, question, runs_dir, json=json)
    return run(typed, question, runs_dir, json=json)


@options.spread
def bench(
    *,
    target: options.TargetOptions,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch", metavar="ROWS,...", help="Batches to measure, in rows.", show_default="the configured one"
        ),
    ] = None,
    compile: Annotated[
        Literal["no", "yes", "both"] | None,
        typer.Option("--compile", help="Whether models are compiled.", show_default="as configured"),
    ] = None,
    recompute: Annotated[
        Literal["no", "yes", "both"] | None,
        typer.Option("--recompute", help="Activation checkpointing.", show_default="as configured"),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            "--memory-limit", metavar="SIZE", help="Memory of a cell, such as 2GiB.", show_default="what is available"
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Timed steps of each cell.")] = 5,
    json: options.Json = False,
) -> int:
    """Measure speed and memory: every combination of batch, --precision (a list too), compilation and recompute.

    Each cell trains a few real steps in a process of its own; one that runs out of memory is recorded, not fatal.
    Tokens a second, step time, peak memory beside the predicted one, what is left of the limit, and model FLOPs
    utilisation against the matrix product measured in the same process. The table as Markdown and JSON and a picture go
    below RUNS/.find and into MLflow, and `orchestrate plan` knows the device from then on. Needs no Ray.

    [bold]Examples[/bold]

      orchestrate bench fundamentallm/small --batch 8,16,32
      orchestrate bench codelm/tiny --batch 4,8,16 --precision fp32,bf16 --compile both
      orchestrate bench genesis/microscope --device cuda --precision bf16 --recompute both --batch 16,24,32,48,64

    Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
    """
    from dataclasses import replace

    from orchestrator.bench import BenchQuestion
    from orchestrator.bench_report import run
    from orchestrator.memory_plan import rows_of

    names = None if target.precision is None else tuple(target.precision.split(","))
    target = replace(target, precision=None)  # of the cells, not of what they are made from
    question = BenchQuestion(rows_of(batch), names, compile, recompute, memory_limit, steps)
    return run(_typed(target), question, target.runs_dir.absolute(), json=json)


def _typed(target: options.TargetOptions) -> Typed:
    from orchestrator.finders import Typed
    from orchestrator.target import split

    settings = split(list(target.settings or ()))[1]
    return Typed(target.resolve(), tuple(settings), target.flags(), target.typed_runs_dir)
