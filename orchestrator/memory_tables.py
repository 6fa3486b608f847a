"""Memory plans on the screen: components of the configured run, and every way to run it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from orchestrator.console import count, size

if TYPE_CHECKING:
    from orchestrator.memory_plan import MemoryPlan, PlannedCell

NAMES = {"runtime_state": "runtime state", "snapshot": "snapshot buffer"}


def components_table(plan: MemoryPlan) -> Table:
    """Where the memory of the configured run goes, a column for each micro-batch."""
    cell = plan.cells[0]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("memory of one worker", no_wrap=True)
    for rows, _ in cell.shown:
        table.add_column(f"{count(rows)} row{'s' if rows > 1 else ''} at a time", justify="right", no_wrap=True)
    names = [name for name, _ in next(iter(cell.shown))[1].parts()]
    for name in names:
        values = [getattr(parts, name) for _, parts in cell.shown]
        if any(values):
            table.add_row(NAMES.get(name, name), *(size(value) for value in values))
    table.add_row("in all", *(size(parts.total) + _fits(parts.total, plan) for _, parts in cell.shown), style="bold")
    table.add_row("heaviest in", *(parts.moment for _, parts in cell.shown), style="dim")
    return table


def _fits(total: int, plan: MemoryPlan) -> str:
    return "" if total <= plan.room.bytes else " (too much)"


def cells_table(plan: MemoryPlan) -> Table:
    """Every way to run it: what it takes with the micro-batches asked for, and the largest that fits."""
    several = len({cell.engine for cell in plan.cells}) > 1
    speeds = any(cell.tokens_per_s for cell in plan.cells)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("precision", "recompute", *(["engine"] if several else []), "compile"):
        table.add_column(heading, no_wrap=True)
    for rows, _ in plan.cells[0].shown:
        table.add_column(f"{count(rows)} row{'s' if rows > 1 else ''}", justify="right", no_wrap=True)
    table.add_column("most rows", justify="right", no_wrap=True)
    table.add_column("use", no_wrap=True)
    if speeds:
        table.add_column("tokens/s", justify="right", no_wrap=True)
    for cell in plan.cells:
        words = [cell.precision, "yes" if cell.recompute else "no"]
        words += [cell.engine] if several else []
        words.append("yes" if cell.config.compile else "no")
        taken = [size(parts.total) + ("" if parts.total <= plan.room.bytes else " !") for _, parts in cell.shown]
        speed = [count(cell.tokens_per_s) if cell.tokens_per_s else ""] if speeds else []
        table.add_row(*words, *taken, count(cell.largest) if cell.largest else "none", _use(cell), *speed)
    return table


def _use(cell: PlannedCell) -> str:
    if cell.fitted is None or cell.fitted.micro_sequences is None:
        return ""
    micro = cell.fitted.micro_sequences
    passes = cell.config.sequences_per_step // (micro * cell.config.workers)
    return f"{micro} x {passes}" if passes > 1 else str(micro)


def memory_notes(plan: MemoryPlan) -> Iterator[str]:
    """What a person should know about the numbers."""
    calibration = plan.room.calibration
    if not calibration.measured_on:
        yield (
            f"what {plan.room.device} adds to the tensors ({size(calibration.framework_bytes(0))}) is what is usual: "
            "it has not been measured on this device. `orchestrate bench` and sweeps do."
        )
    if any(cell.config.compile for cell in plan.cells) and calibration.compiled == 1.0:
        yield "a compiled model is counted as an eager one; it rarely takes more."
    for cell, reason in plan.left_out:
        yield f"left out: {cell}: {reason}"
