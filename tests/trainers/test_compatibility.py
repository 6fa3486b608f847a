"""The table of docs/precision.md says what happens when each cell is tried."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.trainers.compatibility_cells import (
    ENGINES,
    QUICK,
    STANDING,
    Bench,
    Cell,
    Found,
    cells,
    read,
    render,
    written,
)

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield Bench(tmp_path_factory.mktemp("cells"))


@pytest.fixture(scope="module")
def table() -> dict[Cell, Found]:
    return read(written())


def test_the_page_has_every_cell_and_reads_as_it_was_written(table: dict[Cell, Found]) -> None:
    assert set(table) == set(cells())
    assert render(table) == written()
    assert all((found.verdict == "runs") == (not found.reasons) for found in table.values())
    assert {cell for cell, found in table.items() if found.verdict not in STANDING} == set()


def test_a_table_with_another_verdict_reads_as_it_was_written_too(table: dict[Cell, Found]) -> None:
    """Also one that was rendered when there were fewer engines."""
    failing = {**table, Cell("fp32", "adamw", "torch"): Found("failed", ("the loss went from 1.0000 to 2.0000",))}
    assert read(render(failing)) == failing != table
    lines = [line.split("|") for line in render(table).splitlines()]
    narrow = "\n".join("|".join([*line[:3], *line[4:]]) if len(line) > 4 else "|".join(line) for line in lines)
    assert read(narrow) == {cell: found for cell, found in table.items() if cell.engine != next(iter(ENGINES))}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", sorted({cell.precision for cell in cells()}))
def test_cells_of_one_process_are_as_the_page_says(bench: Bench, table: dict[Cell, Found], precision: str) -> None:
    tried = {cell: bench.attempt(cell) for cell in cells(QUICK) if cell.precision == precision}
    assert tried == {cell: table[cell] for cell in tried}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine not in QUICK])
def test_cells_of_other_engines_are_as_the_page_says(bench: Bench, table: dict[Cell, Found], engine: str) -> None:
    pytest.importorskip("deepspeed")
    tried = {cell: bench.attempt(cell) for cell in cells((engine,))}
    assert tried == {cell: table[cell] for cell in tried}


def test_a_loss_that_does_not_fall_is_no_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    from tests.trainers import compatibility_cells

    monkeypatch.setitem(compatibility_cells.OPTIMIZERS, "adamw", ["optim.lr=1e-9"])
    found = bench.attempt(Cell("fp32", "adamw", "torch"))
    assert found.verdict == "failed" and "the loss went from" in found.reasons[0]


def test_a_run_whose_state_is_not_what_its_name_promises_is_no_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without an 8-bit optimizer."""
    from tests.trainers import compatibility_cells

    words = {**compatibility_cells.WORDS["int8"], "precision.optimizer_state": "fp32"}
    monkeypatch.setitem(compatibility_cells.WORDS, "int8", words)
    found = bench.attempt(Cell("int8", "adamw", "torch"))
    assert found == Found("failed", ("int8, adamw, torch: optimizer state is ['float32'], not ['float32', 'uint8']",))
