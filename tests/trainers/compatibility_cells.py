"""The cells of the table in docs/precision.md: each one is tried, and says what happened.

`python -m tests.trainers.compatibility_cells [--untried] [ENGINE ...]` tries them and puts them into the page, one
after the other, so that it may be stopped and gone on with: `--untried` leaves out what has been judged. It ends with 1
where a cell failed.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from search_spaces.precisions import PRECISIONS
from tests.trainers import small_runs
from tests.trainers.crash import attempt
from tests.trainers.small_runs import config_for
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.context import LocalContext
from trainers.devices import check_machine
from trainers.errors import ConfigError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "precision.md"
BEGIN, END = "<!-- the table: written by tests/trainers/compatibility_cells.py -->", "<!-- the end of the table -->"

STEPS = 30
PURE = {"precision.compute": "bf16", "precision.bf16_weights": "true"}
WORDS: dict[str, dict[str, object]] = {
    **{name: dict(precision.sets) for name, precision in PRECISIONS.items()},
    "bf16 weights": PURE,
}
OPTIMIZERS: dict[str, list[str]] = {
    "adamw": ["optim.lr=1e-2"],
    "adam": ["optim.lr=1e-2"],
    "sgd": ["optim.lr=0.3"],
    "rmsprop": ["optim.lr=1e-3"],
    "lion": ["optim.lr=2e-3"],
    "ademamix": ["optim.lr=5e-3"],
}
ENGINES: dict[str, list[str]] = {
    "torch": [],
    "torch, 2 workers": ["workers=2"],
    "torch, compile": ["compile=true"],
    "FSDP2": ["parallel=fsdp", "workers=2"],
    "FSDP2, compile": ["parallel=fsdp", "workers=2", "compile=true"],
    **{f"ZeRO-{n}": ["engine=deepspeed", f"deepspeed.zero_stage={n}", "workers=2"] for n in (2, 3)},
    "ZeRO-2, compile": ["engine=deepspeed", "deepspeed.zero_stage=2", "workers=2", "compile=true"],
    "ZeRO-3, compile": ["engine=deepspeed", "deepspeed.zero_stage=3", "workers=2", "compile=true"],
}
QUICK = ("torch",)
"""engines that take no seconds a cell"""

# precision -> the dtypes of (parameters, optimizer state) that its name promises, beside counts of steps
PROMISED: dict[str, tuple[set[str], set[str]]] = {
    "fp32": ({"float32"}, {"float32"}),
    "bf16": ({"float32"}, {"float32"}),
    "fp16": ({"float32"}, {"float32"}),
    "int8": ({"float32"}, {"uint8", "float32"}),  # its products are int8: tests/trainers/test_int8_linear.py
    "int4": ({"uint8", "float32"}, {"float32"}),
    "bf16 weights": ({"bfloat16"}, {"float32"}),
}
COUNTS = {"int64"}
STANDING = ("runs", "refused", "needs a GPU")
"""what a cell of the finished page may say"""
NO_KERNEL = re.compile(r"not implemented for|Could not run '|no kernel", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Cell:
    precision: str
    optimizer: str
    engine: str


@dataclass(frozen=True)
class Found:
    """`runs`, `refused`, `needs a GPU` or `failed`, and why: a sentence for each reason. `untried`: nobody knows."""

    verdict: str
    reasons: tuple[str, ...] = ()


UNTRIED = Found("untried")


def cells(engines: Sequence[str] = tuple(ENGINES)) -> Iterator[Cell]:
    yield from itertools.starmap(Cell, itertools.product(WORDS, OPTIMIZERS, engines))


class Bench:
    """A folder with a text and a finished run to start from; tries cells."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.text = small_runs.write_text(folder)
        self.other = folder / "other.txt"  # in the same characters, and nothing like it: what adapters have to learn
        self.other.write_text(" ".join([*small_runs.WORDS] * 20))

    def config(self, cell: Cell) -> RunConfig:
        """Raises ConfigError for what is refused."""
        words = [f"{path}={value}" for path, value in WORDS[cell.precision].items()]
        adapts = cell.precision == "int4"
        initial = [f"init_from={self.base}"] if adapts else []
        small = ["optim.min_8bit_size=256", f"optim.name={cell.optimizer}", "evaluation.every_steps=1000"]
        base = config_for(
            self.other if adapts else self.text, device="cpu", budget={"steps": STEPS}, samples={"count": 0}
        )
        return override(base, [*small, *OPTIMIZERS[cell.optimizer], *initial, *ENGINES[cell.engine], *words])

    @cached_property
    def base(self) -> Path:
        config = config_for(self.text, device="cpu", budget={"steps": 100}, samples={"count": 0})
        _train(config, self.folder / "base")
        return self.folder / "base"

    def attempt(self, cell: Cell) -> Found:
        """What happens. `failed`: the training broke off, its loss did not fall, or its types are not the promised."""
        try:
            config = self.config(cell)
            check_machine(config, "cpu")
        except ConfigError as error:
            return Found("refused", tuple(line.strip() for line in str(error).splitlines()))
        run = self.folder / re.sub(r"\W+", "-", f"{cell}")
        try:
            if config.workers == 1:
                _train(config, run)
            else:
                ending = attempt(config, run, workers=config.workers)
                assert ending.state == "finished", f"a worker ended with {ending.exitcode} {ending.failure}"
            _judge(cell, run)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            if isinstance(error, RuntimeError) and NO_KERNEL.search(str(error)):
                return Found("needs a GPU", (lines[0],))
            return Found("failed", (f"{cell.precision}, {cell.optimizer}, {cell.engine}: {lines[0]}",))
        finally:
            shutil.rmtree(run, ignore_errors=True)
        return Found("runs")


def _train(config: RunConfig, run: Path) -> None:
    from trainers.loop import train

    context = LocalContext(run)
    try:
        assert train(config, context).state == "finished"
    finally:
        context.close()


def _judge(cell: Cell, run: Path) -> None:
    """AssertionError, in a line, for a loss that does not fall and for types that are not promised."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.97 * first, f"the loss went from {first:.4f} to {last:.4f}"
    seen: dict[str, set[str]] = {"parameters": set(), "optimizer": set()}
    for key in {key for row in rows for key in row}:
        if found := re.fullmatch(r"dtypes/(parameters|optimizer)/(\w+)_bytes", key):
            seen[found[1]].add(found[2])
    zero_mixed = cell.engine.startswith("ZeRO") and cell.precision == "bf16"  # fp32 master weights are shared out
    parameters, state = ({"bfloat16"}, {"float32"}) if zero_mixed else PROMISED[cell.precision]
    assert seen["parameters"] == parameters, f"parameters are {sorted(seen['parameters'])}, not {sorted(parameters)}"
    stateless = cell.optimizer == "sgd" and not seen["optimizer"]
    kept = seen["optimizer"] - COUNTS
    assert stateless or kept == state, f"optimizer state is {sorted(kept)}, not {sorted(state)}"


# ---- the page -------------------------------------------------------------------------------------------------


def render(found: dict[Cell, Found]) -> str:
    """The table in Markdown, with each reason once below it."""
    reasons: dict[str, int] = {}

    def shown(cell: Cell) -> str:
        what = found[cell]
        numbers = [str(reasons.setdefault(reason, len(reasons) + 1)) for reason in what.reasons]
        return f"{what.verdict} ({', '.join(numbers)})" if numbers else what.verdict

    lines = [f"| precision | optimizer | {' | '.join(ENGINES)} |", "| --- | --- |" + " --- |" * len(ENGINES)]
    for precision, optimizer in itertools.product(WORDS, OPTIMIZERS):
        row = [shown(Cell(precision, optimizer, engine)) for engine in ENGINES]
        lines.append(f"| {precision} | {optimizer} | {' | '.join(row)} |")
    return "\n".join([*lines, "", *(f"{n}. {reason}" for n, reason in enumerate(reasons, 1))])


def written() -> str:
    """The table that stands in the page."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


def read(table: str) -> dict[Cell, Found]:
    """The cells of a rendered table; it may have been rendered with other engines."""
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", table, re.M))
    found: dict[Cell, Found] = {}
    engines: list[str] = []
    for line in table.splitlines():
        columns = [column.strip() for column in line.strip("|").split("|")]
        if columns[0] == "precision":
            engines = columns[2:]
        if columns[0] not in WORDS:
            continue
        for engine, text in zip(engines, columns[2:], strict=True):
            verdict, _, numbers = text.rstrip(")").partition(" (")
            why = tuple(reasons[number] for number in numbers.split(", ") if number)
            found[Cell(columns[0], columns[1], engine)] = Found(verdict, why)
    return found


def put(found: dict[Cell, Found]) -> None:
    """Write the table into the page."""
    table = render({cell: found.get(cell, UNTRIED) for cell in cells()})
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    os.replace(temporary, PAGE)


def main(words: Sequence[str]) -> int:
    """Try the cells of the named engines (none named: of all), the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    engines = tuple(word for word in words if word != "--untried") or tuple(ENGINES)
    found = read(written())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for cell in cells(engines):
            if "--untried" in words and found.get(cell, UNTRIED).verdict in STANDING:
                continue
            found[cell] = bench.attempt(cell)
            put(found)
            print(cell, found[cell], flush=True)
    put(found)
    return int(any(what.verdict == "failed" for what in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
