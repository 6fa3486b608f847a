"""What every test shares: where the real text lies, a Hub of our own, and property tests without a clock."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.trainers.data.hub_server import HubServer

settings.register_profile("shared-machine", deadline=None)  # a busy machine is no failure
settings.load_profile("shared-machine")

ROOT = Path(__file__).resolve().parent.parent

# No test asks the real Hub. huggingface_hub reads HF_ENDPOINT at its first import, and peft imports it: hence here.
_HUB = HubServer({})
_HUB.__enter__()  # at once: whoever inherits HF_ENDPOINT gets an answer, be it "no such dataset"
_CACHE = tempfile.TemporaryDirectory(prefix="hub-cache-", ignore_cleanup_errors=True)
os.environ.update(
    HF_ENDPOINT=_HUB.url,
    HF_HOME=_CACHE.name,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
)


@pytest.fixture(scope="session")
def local_hub() -> HubServer:
    """The server; a test module adds its own repositories to `repositories`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    assert _HUB.url == constants.ENDPOINT, "huggingface_hub was imported before this conftest"
    return _HUB


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
