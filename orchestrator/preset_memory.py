"""`plan --table`: what each preset takes in each precision, and what fits on a card: the guides' tables, predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.console import count, size
from orchestrator.memory_plan import MemoryPlan, MemoryQuestion, PlannedCell, Room, plan_memory
from orchestrator.presets_table import known_vocabulary
from trainers.config import RunConfig
from trainers.presets import PRESETS

USUAL_CARD = "24GiB"
CHARACTERS = 96
"""vocabulary assumed of a tokenizer of characters: printable ASCII and the line's end"""
COLUMNS = (("fp32", False), ("bf16", False), ("bf16", True), ("int8", False), ("int8", True))
"""precision and recompute"""


@dataclass(frozen=True)
class PresetMemory:
    """Every preset asked for, on one kind of device."""

    room: Room
    plans: tuple[tuple[str, MemoryPlan], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.room.device,
            "limit_bytes": self.room.bytes,
            "limit_source": self.room.what,
            "presets": {name: plan.to_json()["cells"] for name, plan in self.plans},
        }


def preset_memory(named: RunConfig | None, question: MemoryQuestion, calibrations: Path) -> PresetMemory:
    """The memory of `named`, or of every preset, with each one's own micro-batch. Raises UserError."""
    configs = [named] if named is not None else [make() for make in PRESETS.values()]
    if question.gpu_memory is None:
        question = MemoryQuestion(question.gpus, USUAL_CARD, question.batches)
    room = question.room(configs[0], calibrations)
    plans = []
    for config in configs:
        applied = question.applied(config)
        vocabulary = known_vocabulary(applied) or CHARACTERS
        plans.append((config.preset, plan_memory(applied, vocabulary, room, batches=question.batches, variants=True)))
    return PresetMemory(room, tuple(plans))


def preset_memory_table(found: PresetMemory) -> Table:
    """A line for each preset: its size, and memory with the most rows that fit, in each precision."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("preset", no_wrap=True)
    for heading in ("parameters", "checkpoint", "rows"):
        table.add_column(heading, justify="right", no_wrap=True)
    for precision, recompute in COLUMNS:
        table.add_column(f"{precision}\nrecompute" if recompute else precision, justify="right", no_wrap=True)
    for name, plan in found.plans:
        first = plan.cells[0]
        table.add_row(
            name,
            count(first.footprint.structure.values),
            size(first.checkpoint_bytes),
            count(first.batches[0]),
            *(_entry(cell) for cell in _columns(plan.cells)),
        )
    return table


def _columns(cells: Sequence[PlannedCell]) -> Iterator[PlannedCell | None]:
    for precision, recompute in COLUMNS:
        yield next((each for each in cells if (each.precision, each.recompute) == (precision, recompute)), None)


def _entry(cell: PlannedCell | None) -> str:
    if cell is None:
        return ""
    total = cell.shown[0][1].total
    return f"{size(total)}\n({count(cell.largest) if cell.largest else 'none'})"


def table_notes(found: PresetMemory) -> Iterator[str]:
    """How the table is to be read."""
    yield (
        f"memory of one worker with the preset's own micro-batch (`rows`), and in brackets the most rows that fit into "
        f"{size(found.room.bytes)} ({found.room.what})."
    )
    yield f"a tokenizer of characters is counted with {CHARACTERS} of them."
