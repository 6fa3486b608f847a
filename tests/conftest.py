"""What every test shares: where the real text lies, and property tests without a clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("shared-machine", deadline=None)  # a busy machine is no failure
settings.load_profile("shared-machine")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shared_data() -> Path:
    """The folder of real texts beside the project; the test is skipped where there is none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data beside the project")
    return folder


STARTS_RAY = (
    "tests/cluster/test_jobs.py",
    "tests/orchestrator/test_engines.py",
    "tests/orchestrator/test_faults.py",
    "tests/orchestrator/test_out_of_memory.py",
    "tests/orchestrator/test_sweep_faults.py",
    "tests/orchestrator/test_sweep_memory.py",
    "tests/orchestrator/test_sweeps.py",
    "tests/orchestrator/test_train.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray comes first: where two processes share the tests it is the longest piece."""
    for item in items:
        told = item.nodeid.startswith(STARTS_RAY) or item.get_closest_marker("ray") is None
        assert told, f"{item.nodeid} starts Ray, and its file does not stand in STARTS_RAY"
    items.sort(key=lambda item: not item.nodeid.startswith(STARTS_RAY))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One of several processes has all that starts Ray (two Rays are too many); the others take file after file."""
    from xdist.scheduler import LoadScopeScheduling

    class OneRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(STARTS_RAY) else nodeid.partition("::")[0]

    return OneRay(config, log)
