"""A real Ray cluster of one node on this machine: `ray start --head`, token authentication on."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

PATIENCE_S = 120.0
BIN = Path(sys.executable).parent
REMEMBERED = Path("/tmp/ray/ray_current_cluster")


class Head:
    """The node's processes, and the environment of a person who may use it."""

    def __init__(self, folder: Path, cpus: int, *, dashboard: bool = True):
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: it holds the names of sockets
        self.token = folder / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        self._gcs, board, client, agent, agent_grpc, environments, metrics = free_ports(7)
        self.address = f"http://127.0.0.1:{board}"
        self.gcs_address = f"127.0.0.1:{self._gcs}"
        """what RAY_ADDRESS names for a driver on this machine"""
        self._dashboard = dashboard
        self.log = folder / "head.log"
        options = {
            "port": self._gcs,
            "num-cpus": cpus,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": board,
            "ray-client-server-port": client,
            "dashboard-agent-listen-port": agent,
            "dashboard-agent-grpc-port": agent_grpc,
            "runtime-env-agent-port": environments,
            "metrics-export-port": metrics,
            "min-worker-port": 0,
            "max-worker-port": 0,
            "object-store-memory": 200 << 20,
            "temp-dir": self.temporary,
        }
        command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--include-dashboard={str(dashboard).lower()}"]
        command += [f"--{name}={value}" for name, value in options.items()]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=self.environment(), start_new_session=True
            )

    def environment(self, **more: str) -> dict[str, str]:
        """What a command on this machine needs, and nothing of what the test's own shell has to say of Ray."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "ORCHESTRATE_"))}
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        return plain | token | {"PATH": path, "COLUMNS": "120"} | more

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers():
            assert self.process.poll() is None, self.log.read_text(errors="replace")
            assert time.monotonic() < deadline, f"no answer in {PATIENCE_S} s: {self.log.read_text(errors='replace')}"
            time.sleep(0.2)

    def _answers(self) -> bool:
        if not self._dashboard:
            with socket.socket() as knocking:
                return knocking.connect_ex(("127.0.0.1", self._gcs)) == 0
        request = urllib.request.Request(
            f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {self.token.read_text()}"}
        )
        try:
            return bool(urllib.request.urlopen(request, timeout=5).status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def close(self) -> None:
        """No process of this node is left; `ray stop` would take every other Ray of this machine with it."""
        family: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        for process in family:  # psutil knows a process by its start time too: no stranger with a reused id
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        shutil.rmtree(self.temporary, ignore_errors=True)
        with suppress(OSError):  # Ray notes the newest cluster of the machine, and whoever starts Ray would wait for it
            if REMEMBERED.read_text(encoding="utf-8").endswith(f":{self._gcs}"):
                REMEMBERED.unlink()


def free_ports(count: int) -> list[int]:
    """Ports that nobody holds, each another."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
