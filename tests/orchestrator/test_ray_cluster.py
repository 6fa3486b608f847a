"""Laws of the local cluster that a command starts, as far as they need none; the rest is seen in whole commands."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from orchestrator.ray_cluster import _few_processes, _started_ahead

PRESTART = "RAY_enable_worker_prestart"
IDLE = "RAY_idle_worker_killing_time_threshold_ms"


def test_only_what_is_started_inside_goes_without_ray_s_helpers() -> None:
    """Who joins such a cluster finds no address of a dashboard, as Ray says it where the dashboard is off."""
    from ray._private import utils
    from ray._private.node import Node

    def helpers() -> tuple[object, ...]:
        started = Node.start_api_server, Node.start_monitor, Node.start_log_monitor
        return *started, utils.get_dashboard_dependency_error

    before = helpers()
    noted: list[tuple[object, ...]] = []
    node = SimpleNamespace(
        get_gcs_client=lambda: SimpleNamespace(internal_kv_put=lambda *entry: noted.append(entry)), _webui_url=None
    )
    with pytest.raises(KeyboardInterrupt), _few_processes(verbose=False):
        Node.start_api_server(node, include_dashboard=False, raise_on_failure=False)  # type: ignore[arg-type]
        Node.start_monitor(node)  # type: ignore[arg-type]
        Node.start_log_monitor(node)  # type: ignore[arg-type]
        assert utils.get_dashboard_dependency_error() is not None
        raise KeyboardInterrupt
    assert helpers() == before
    with _few_processes(verbose=True):
        assert helpers()[2] is before[2]  # it is what brings the workers' lines to the terminal
    assert node._webui_url == "" and noted == [(b"webui:url", b"", True, b"dashboard")]


def test_processes_started_ahead_stay_until_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray ends an idle one after a second, when it has not even imported what it was started for."""
    monkeypatch.delenv(PRESTART, raising=False)
    monkeypatch.setenv(IDLE, "7")
    with _started_ahead(("json",)):
        assert os.environ[PRESTART] == "1" and int(os.environ[IDLE]) >= 30_000
    assert PRESTART not in os.environ and os.environ[IDLE] == "7"
    with _started_ahead(()):
        assert os.environ[IDLE] == "7"
