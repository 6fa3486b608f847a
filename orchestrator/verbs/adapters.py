"""merge: the way out of adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.verbs import options


def merge(
    run: options.RunName,
    *,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the run to write.")],
    checkpoint: options.Checkpoint = None,
    runs_dir: options.RunsDir = options.DEFAULT_RUNS,
    json: options.Json = False,
) -> int:
    """Write adapters and the weights under them as one run of plain weights.

    It computes what the adapted model does: 4-bit weights count as what they stand for. The run it comes from stays.

    [bold]Examples[/bold]

      orchestrate train first-run --name tuned --init-from first-run --precision int4 --data notes.txt
      orchestrate merge tuned --name tuned-whole
      orchestrate generate tuned-whole --prompt "The "
    """
    from orchestrator.merging import merge_run

    return merge_run(run=run, name=name, checkpoint=checkpoint, runs_dir=runs_dir.absolute(), json=json)
