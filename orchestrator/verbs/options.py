"""Options that several verbs share, alone and as the two nouns that they make together.

A verb takes a noun as one keyword-only parameter and is decorated with `spread`, which shows typer its options:

    @options.spread
    def plan(*, target: options.TargetOptions, json: options.Json = False) -> int: ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from orchestrator.target import Flags, Target

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
        "--precision",
        metavar="fp32|fp16|bf16|int8|int4",
        help="What it computes in and keeps its numbers in. int4 trains adapters over the frozen weights of a run: it "
        "needs --init-from.",
        show_default="the preset's",
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


@dataclass(frozen=True)
class TargetOptions:
    """What to train: a preset, a file or a run, with the flags and settings that change it."""

    settings: Settings = None
    data: Data = None
    text_field: TextField = None
    runs_dir: RunsDir = DEFAULT_RUNS
    workers: Workers = None
    precision: Precision = None
    seed: Seed = None
    device: Device = None
    init_from: InitFrom = None

    def flags(self) -> Flags:
        from orchestrator.target import Flags

        return Flags(
            data=tuple(self.data or ()),
            text_field=self.text_field,
            workers=self.workers,
            precision=self.precision,
            seed=self.seed,
            device=self.device,
            init_from=self.init_from,
        )

    @property
    def typed_runs_dir(self) -> Path | None:
        """The runs folder where another than the default was named, for commands to paste."""
        return None if self.runs_dir == DEFAULT_RUNS else self.runs_dir

    def resolve(self) -> Target:
        """The one configuration that all of it means. Raises UserError."""
        from orchestrator.target import resolve

        return resolve(list(self.settings or ()), self.flags(), self.runs_dir.absolute())


@dataclass(frozen=True)
class WeightsOptions:
    """Which weights of a run, and what computes with them."""

    checkpoint: Checkpoint = None
    device: Device = None
    runs_dir: RunsDir = DEFAULT_RUNS


def spread(verb: Callable[..., int]) -> Callable[..., int]:
    """`verb` as typer needs it: a parameter that is a dataclass of options gives way to the options themselves."""
    signature = inspect.signature(verb, eval_str=True)
    parts = signature.parameters.values()
    nouns: dict[str, Any] = {part.name: part.annotation for part in parts if is_dataclass(part.annotation)}

    @functools.wraps(verb)
    def spread_out(**given: Any) -> int:
        for name, noun in nouns.items():
            given[name] = noun(**{option.name: given.pop(option.name) for option in fields(noun)})
        return verb(**given)

    spread_out.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[option for part in parts for option in _options_of(part)]
    )
    return spread_out


def _options_of(part: Parameter) -> Iterator[Parameter]:
    if not is_dataclass(part.annotation):
        yield part.replace(kind=Parameter.KEYWORD_ONLY)
        return
    assert isinstance(part.annotation, type)
    hints = get_type_hints(part.annotation, include_extras=True)
    for option in fields(part.annotation):
        yield Parameter(option.name, Parameter.KEYWORD_ONLY, default=option.default, annotation=hints[option.name])


def sentence(error: typer.TyperException) -> str:
    """What typer says of a command line, with the value that it may leave out (typer 0.29: `Input should be a valid
    integer, unable to parse string as an integer`)."""
    text = error.format_message()
    problems = getattr(error.__cause__, "errors", None)  # pydantic's, of one value
    if problems is not None:
        found = problems()[0]
        said = found["msg"].partition(", unable to parse")[0].removeprefix("Value error, ").removesuffix(".")
        said = said.replace("Input should be", "it must be")
        given = "" if repr(found["input"]) in said else f", got {_short(found['input'])}"
        text = text.replace(error.message.removesuffix("."), said).removesuffix(".") + given
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
