"""The programme of faults counts what it played, and one case that goes wrong is a failed case and no more."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks import chaos


def closing(*errors: Exception) -> Any:
    """A bench whose place raises these when it is closed."""

    def close() -> None:
        for error in errors:
            raise error

    return SimpleNamespace(place=SimpleNamespace(close=close))


def test_a_selection_of_no_test_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="nothing was played"):
        chaos.tests("tests/test_layering.py", "-k", "no_test_has_this_name")(closing(), 0)
    with pytest.raises(AssertionError):
        chaos.tests("tests/test_layering.py::no_test_has_this_name")(closing(), 0)
    assert chaos.tests("tests/test_layering.py", "-k", "keeps_to_its_room")(closing(), 0)["plays"] == 1


@pytest.mark.parametrize(
    "error", [psutil.NoSuchProcess(1), subprocess.TimeoutExpired("x", 1), AssertionError("a law"), None]
)
@pytest.mark.parametrize("on_closing", [False, True])
def test_whatever_goes_wrong_is_a_failed_case(
    error: Exception | None, on_closing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(bench: chaos.Bench, seed: int) -> dict[str, Any]:
        if error is not None and not on_closing:
            raise error
        return {"plays": 3}

    monkeypatch.setitem(chaos.FAULTS, "F1", chaos.Fault("", 1, play))
    case = chaos.play(closing(*([error] if error and on_closing else [])), "F1", 0)
    assert case.passed is (error is None)
    assert error is None or type(error).__name__ in str(case.problem)


def test_a_person_may_still_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def play(bench: chaos.Bench, seed: int) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setitem(chaos.FAULTS, "F1", chaos.Fault("", 1, play))
    with pytest.raises(KeyboardInterrupt):
        chaos.play(closing(), "F1", 0)


def test_programmes_side_by_side_keep_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(chaos, "RECORD", tmp_path / "results" / "chaos.json")
    with ThreadPoolExecutor(8) as programmes:
        for _ in programmes.map(lambda seed: chaos.kept(chaos.Case("F1", seed, True, 1, 1.0, "")), range(20)):
            pass
    assert set(chaos.read_record()) == {("F1", seed) for seed in range(20)}
