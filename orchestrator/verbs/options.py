"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunsDir = Annotated[
    Path,
    typer.Option(
        "--runs-dir", envvar="ORCHESTRATE_RUNS", metavar="FOLDER", help="Where runs live.", show_default="./runs"
    ),
]
DEFAULT_RUNS = Path("runs")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for programs.")]

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PRESET|FILE.yaml|RUN PATH=VALUE",
        help="What to train: a preset, a YAML file or an existing run (default: fundamentallm/small). "
        "Then any setting by its path, such as budget.steps=300 or optim.lr=1e-3.",
        show_default=False,
    ),
]

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="CORPUS",
        help="Text to train on: a file or folder (text, JSONL, Parquet; .gz and .zst too), python-stdlib, or "
        "hf:OWNER/NAME. Several are joined in order.",
        show_default=False,
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(
        "--text-field",
        metavar="NAME",
        help="Field that holds the text in JSONL, Parquet and Hub data.",
        show_default="text",
    ),
]
Workers = Annotated[
    int | None, typer.Option("--workers", metavar="N", help="Processes that train together.", show_default="1")
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision", metavar="fp32|fp16|bf16", help="Arithmetic of forward and backward.", show_default="the preset's"
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Of everything random.", show_default="42")]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="auto|cpu|cuda|mps", help="What to compute on.", show_default="auto"),
]
InitFrom = Annotated[
    str | None,
    typer.Option("--init-from", metavar="RUN", help="Start from the weights of this run.", show_default=False),
]
Checkpoint = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="best|latest|STEP", help="Which weights.", show_default="best, else latest"),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run (`orchestrate runs` lists them).")]
