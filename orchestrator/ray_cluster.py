"""Ray as the driver needs it: a quiet local cluster, or the one RAY_ADDRESS names. Imports ray inside functions."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.errors import UserError
from trainers.openmp import spin_briefly

POLL_S = "0.5"  # how often Ray Train's controller looks at its workers; a report waits for it


@dataclass(frozen=True)
class Resources:
    """What each worker gets."""

    cpus: int
    gpus: int
    """1 or 0"""
    gpus_there: int
    """in the whole cluster"""


@contextlib.contextmanager
def ray_cluster(workers: int, *, verbose: bool, log_path: Path) -> Iterator[Any]:
    """A connection to Ray for the duration of a run: RAY_ADDRESS if set, else a cluster of this machine alone.

    The local cluster listens on loopback, asks for a token, and has no dashboard. Ray's own log lines go to
    `log_path` and to the terminal only under `verbose`.
    """
    _environment(verbose)
    import ray

    address = os.environ.get("RAY_ADDRESS")
    _log_to_file(log_path, verbose)
    if address:
        ray.init(address=address, log_to_driver=verbose, logging_level=_level(verbose), configure_logging=True)
    else:
        ray.init(
            address="local",
            num_cpus=max(workers, usable_cpus()),
            include_dashboard=False,
            dashboard_host="127.0.0.1",
            log_to_driver=verbose,
            logging_level=_level(verbose),
        )
    if not verbose:
        _hush_the_raylet()
    try:
        with contextlib.nullcontext() if address else _agents_die_with_us():
            yield ray
    finally:
        ray.shutdown()


def resources_per_worker(ray: Any, workers: int, device: str) -> Resources:
    """An equal share of the cluster's CPUs, and one GPU each where there is one per worker.

    Raises UserError when the cluster could never place the workers.
    """
    total = ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    wants_gpu = device == "cuda" or (device == "auto" and gpus >= workers)
    if wants_gpu and gpus < workers:
        raise UserError(f"--workers {workers} on cuda needs {workers} GPUs; the cluster has {gpus}. Lower --workers.")
    cpus = int(total.get("CPU", 0))
    if cpus < workers:
        raise UserError(f"--workers {workers} needs a CPU each; the cluster has {cpus}. Lower --workers.")
    one_node = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return Resources(min(cpus // workers, one_node), int(wants_gpu), gpus)


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and the quota of its container (cgroup v2), whichever is less."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cpus = min(cpus, max(1, int(quota) // int(period)))  # "max" is no number: no quota
    return cpus


def _environment(verbose: bool) -> None:
    """Set before ray is imported; what the user has set stays."""
    defaults = {
        "RAY_AUTH_MODE": "token",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": POLL_S,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    }
    if not os.environ.get("RAY_ADDRESS"):
        defaults["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody takes this machine away with a notice
        defaults["RAY_prestart_worker_first_driver"] = "0"  # a worker has an environment of its own, so starts anew
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    spin_briefly()  # a local cluster's workers inherit it
    if not os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file())


def _token_file() -> Path:
    """A token of this user's own, readable by nobody else (Ray would write it 0644)."""
    path = Path.home() / ".orchestrate" / "ray_token"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if not path.exists():
        temporary = path.with_name(f".ray_token.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, secrets.token_hex(32).encode())
        os.close(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # the first of two processes wins, and both read the same token
        temporary.unlink()
    return path


def _level(verbose: bool) -> int:
    return logging.INFO if verbose else logging.ERROR


def _log_to_file(path: Path, verbose: bool) -> None:
    """Ray's Python loggers write to a file; to the terminal only when asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("ray", "ray.train", "ray.data", "ray.tune"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name == "ray" else []
        logger.propagate = verbose if name == "ray" else True


# A shell that waits for the end of the driver, whose pipe it reads, and asks each process for its name before it kills.
LAST_RITES = """read _; sleep 5; for p in "$@"; do case $(cat /proc/$p/comm) in ray::*) kill -9 $p;; esac; done"""


@contextlib.contextmanager
def _agents_die_with_us() -> Iterator[None]:
    """When this process is killed, Ray's agents follow in seconds.

    The raylet and the workers do by themselves. The agents first report the death to the cluster's head, and wait a
    minute for an answer although it is dead too (`publish_error`, ray 2.60).
    """
    if sys.platform != "linux":
        yield
        return
    import psutil

    below = [str(process.pid) for process in psutil.Process().children(recursive=True)]
    command = ["/bin/sh", "-c", f"exec >/dev/null 2>&1; {LAST_RITES}", "sh", *below]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as watch:
        try:
            yield
        finally:
            watch.kill()


def _hush_the_raylet() -> None:
    """What the raylet has to say goes to the log: Ray prints it on standard output, `log_to_driver` or not."""
    from ray._private import worker

    def to_log(message: dict[str, Any], **_: Any) -> None:
        logging.getLogger("ray").error("%s", "\n".join(message["lines"]))

    worker.print_to_stdstream = to_log
