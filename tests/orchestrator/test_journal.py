"""The journal holds a prefix of what happened, whatever is cut off, and one writer at a time writes it."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest

from orchestrator.sweeps.history import Ending, History, Seen
from orchestrator.sweeps.journal import JOURNAL, Journal, read_history
from tests.orchestrator.histories import same_history
from trainers.claim import Claim, Guard
from trainers.errors import Superseded

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    with Claim.acquire(tmp_path) as claim:
        yield Guard.begin_attempt(tmp_path, claim.generation)


def happen(journal: Journal) -> list[History]:
    """A few of everything; the history before the first line of the journal and after each."""
    states = [History()]

    def then(_: object) -> None:
        states.append(deepcopy(journal.history))

    then(journal.ask({"optim.lr": 1e-3, "optim.betas": [0.9, 0.95], "note": "Größe \n ok"}))
    then(journal.ask({"optim.lr": 0.1 + 0.2}))
    then(journal.see(0, Seen(100, (1.25, 3.0), 0.1)))
    then(journal.see(1, Seen(100, (math.nan, math.inf)), lambda: "nonfinite"))
    then(journal.end(1, Ending("nonfinite", (1e6, -1e6), 100, 0.5, "the loss is nan")))
    then(journal.see(0, Seen(200, (1.0, 4.0))))
    then(journal.end(0, Ending("completed", (1.0, 4.0), 200, 1.5)))
    return states


def test_what_was_written_replays_to_the_same_history(tmp_path: Path, guard: Guard) -> None:
    journal = Journal(tmp_path / JOURNAL, guard)
    happen(journal)
    journal.close()
    assert len(journal.history.events) == 4
    assert same_history(read_history(tmp_path / JOURNAL), journal.history)
    assert same_history(Journal(tmp_path / JOURNAL, guard).history, journal.history)
    assert not same_history(read_history(tmp_path / "nothing"), journal.history)


def test_cut_at_any_byte_it_holds_what_happened_before_and_goes_on(tmp_path: Path, guard: Guard) -> None:
    path, cut = tmp_path / JOURNAL, tmp_path / "cut.jsonl"
    journal = Journal(path, guard)
    states = happen(journal)
    journal.close()
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        cut.write_bytes(whole[:size])
        lines = whole[:size].count(b"\n")
        assert same_history(read_history(cut), states[lines])
        assert cut.read_bytes() == whole[:size]  # a reader writes nothing
        again = Journal(cut, guard)
        assert same_history(again.history, states[lines])
        again.ask({"optim.lr": 1.0})
        again.close()
        kept = whole[: whole.rfind(b"\n", 0, size) + 1]
        assert cut.read_bytes().startswith(kept)
        assert cut.read_bytes().count(b"\n") == lines + 1
        assert same_history(read_history(cut), again.history)


def test_without_dropping_the_torn_line_the_next_would_be_lost(tmp_path: Path, guard: Guard) -> None:
    """Negative control of the above."""
    path = tmp_path / JOURNAL
    path.write_bytes(b'{"event": "asked", "tri')
    with path.open("ab") as file:
        file.write(b'{"event": "asked", "trial": 0, "params": {}}\n')
    with pytest.raises(ValueError, match="delimiter"):
        read_history(path)


def test_an_evaluation_that_is_replayed_is_written_once(tmp_path: Path, guard: Guard) -> None:
    journal = Journal(tmp_path / JOURNAL, guard)
    journal.ask({})
    assert journal.see(0, Seen(100, (1.0,)))
    before = (tmp_path / JOURNAL).read_bytes()
    assert not journal.see(0, Seen(100, (1.0,)))
    assert (tmp_path / JOURNAL).read_bytes() == before
    assert journal.see(0, Seen(200, (1.0,)))
    assert (tmp_path / JOURNAL).read_bytes() != before


def test_after_a_newer_claim_the_old_writer_writes_nothing(tmp_path: Path) -> None:
    with Claim.acquire(tmp_path) as claim:
        old = Journal(tmp_path / JOURNAL, Guard.begin_attempt(tmp_path, claim.generation))
        old.ask({"optim.lr": 1.0})
        written = (tmp_path / JOURNAL).read_bytes()
    with Claim.acquire(tmp_path) as claim:
        new = Journal(tmp_path / JOURNAL, Guard.begin_attempt(tmp_path, claim.generation))
        for write in (
            lambda: old.ask({}),
            lambda: old.see(0, Seen(100, (1.0,))),
            lambda: old.end(0, Ending("completed", (1.0,), 100, 1.0)),
            lambda: old.rest(0, 1.0),
        ):
            with pytest.raises(Superseded):
                write()
        with pytest.raises(Superseded):
            Journal(tmp_path / JOURNAL, old._guard)
        assert (tmp_path / JOURNAL).read_bytes() == written
        # Negative control: the new writer's do go through.
        new.ask({"optim.lr": 2.0})
        assert (tmp_path / JOURNAL).read_bytes() != written
        assert len(read_history(tmp_path / JOURNAL).trials) == 2


FULL_DISK = """
import resource, sys
from pathlib import Path
from orchestrator.sweeps.journal import Journal, read_history
from trainers.claim import Claim, Guard
folder = Path(sys.argv[1])
with Claim.acquire(folder) as claim:
    journal = Journal(folder / "sweep.jsonl", Guard.begin_attempt(folder, claim.generation))
    journal.ask({"a": 1})
    size = (folder / "sweep.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(size + 10, 4096), resource.RLIM_INFINITY))
    try:
        journal.ask({"long": "x" * 5000})
        sys.exit("the limit did not bite")
    except OSError:
        pass
    assert (folder / "sweep.jsonl").stat().st_size == size
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.ask({"a": 2})
print([trial.params for trial in read_history(folder / "sweep.jsonl").trials.values()])
"""


def test_a_line_that_the_disk_took_by_half_leaves_nothing(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[{'a': 1}, {'a': 2}]\n", "")
