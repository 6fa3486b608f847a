"""One local Hub for all tests of the trainers; nothing here asks the real one.

huggingface_hub reads HF_ENDPOINT once, when it is first imported, and the project imports it inside functions only.
"""

from __future__ import annotations

import os
import tempfile

import pytest

from tests.trainers.data.hub_server import HubServer

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
