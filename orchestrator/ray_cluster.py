"""Ray as the driver needs it: a quiet local cluster, or the one RAY_ADDRESS names. Imports ray inside functions."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.errors import UserError
from trainers.openmp import spin_briefly

IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what `ray job submit` runs
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
def ray_cluster(workers: int, *, verbose: bool, log_path: Path, ahead: Sequence[str] = ()) -> Iterator[Any]:
    """A connection to Ray for the duration of a run: RAY_ADDRESS if set, else a cluster of this machine alone.

    The local cluster listens on loopback, asks for a token, and has no dashboard. Ray's own log lines go to
    `log_path` and to the terminal only under `verbose`. `ahead`: modules that a local cluster's processes, one for
    each CPU, import from the beginning; a task or actor without an environment of its own gets such a process.
    """
    _environment(verbose)
    import ray

    address = os.environ.get("RAY_ADDRESS")
    _log_to_file(log_path, verbose)
    if address:
        ray.init(address=address, log_to_driver=verbose, logging_level=_level(verbose), configure_logging=True)
    else:
        with _started_ahead(ahead), _few_processes(verbose=verbose):
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


@contextlib.contextmanager
def _started_ahead(modules: Sequence[str]) -> Iterator[None]:
    """A raylet that is started inside makes processes that import `modules` before anybody asks for them."""
    settings = {
        "RAY_enable_worker_prestart": "1",
        "RAY_preload_python_modules": ",".join(modules),
        "RAY_idle_worker_killing_time_threshold_ms": "60000",  # Ray would end idle ones after a second
    }
    settings = settings if modules else {}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _few_processes(*, verbose: bool) -> Iterator[None]:
    """A head that is started inside takes as little of the cores as it can (ray 2.60): each of its helpers costs a
    second of a CPU just when the workers want it, and every wake-up while they train stops a matrix product.

    It has no API server, which ray.init would wait for although it serves no dashboard; no autoscaler; an agent that
    serves nothing, as where Ray is installed without its dashboard; and, unless `verbose` wants the workers' lines on
    the terminal, nobody who reads their log files.
    """
    from ray._private import ray_constants, utils
    from ray._private.node import Node

    def say_there_is_none(node: Any, **_: Any) -> None:
        node._webui_url = ""  # as Ray says it; who joins the cluster asks for it
        space = ray_constants.KV_NAMESPACE_DASHBOARD
        node.get_gcs_client().internal_kv_put(b"webui:url", b"", True, space)

    with contextlib.ExitStack() as patches:
        patches.enter_context(_replaced(Node, "start_api_server", say_there_is_none))
        patches.enter_context(_replaced(Node, "start_monitor", lambda node: None))
        patches.enter_context(_replaced(utils, "get_dashboard_dependency_error", lambda: ImportError("not wanted")))
        if not verbose:
            patches.enter_context(_replaced(Node, "start_log_monitor", lambda node: None))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def resources_per_worker(ray: Any, workers: int, device: str) -> Resources:
    """An equal share of the cluster's CPUs, and one GPU each where there is one per worker.

    The CPUs that are reserved for this very process, where it is a job, are not there to share. Raises UserError when
    the cluster could never place the workers.
    """
    total = ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    wants_gpu = device == "cuda" or (device == "auto" and gpus >= workers)
    if wants_gpu and gpus < workers:
        raise UserError(f"--workers {workers} on cuda needs {workers} GPUs; the cluster has {gpus}. Lower --workers.")
    free = free_cpus(ray)
    if sum(free) < workers:
        raise UserError(
            f"--workers {workers} needs a CPU each, and the cluster has {sum(free)} besides what this job itself "
            "holds. Lower --workers."
        )
    return Resources(equal_share(free, workers), int(wants_gpu), gpus)


def free_cpus(ray: Any) -> list[int]:
    """CPUs of each node that lives, less those that a job reserved for this process (`orchestrate submit --cpus`)."""
    here = ray.get_runtime_context().get_node_id()
    held = float(os.environ.get("ORCHESTRATE_DRIVER_CPUS", "0"))
    nodes = ((node["NodeID"], node["Resources"].get("CPU", 0.0)) for node in ray.nodes() if node["Alive"])
    return [int(cpus - (held if node == here else 0)) for node, cpus in nodes]


def equal_share(free: Sequence[int], workers: int) -> int:
    """The most CPUs that each of `workers` can have at once, when a worker lives on one node."""
    return next(share for share in range(max(free), 0, -1) if sum(node // share for node in free) >= workers)


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
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": POLL_S,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    }
    if not os.environ.get("RAY_ADDRESS"):
        defaults["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody takes this machine away with a notice
        defaults["RAY_prestart_worker_first_driver"] = "0"  # a worker has an environment of its own, so starts anew
        defaults["RAY_worker_niceness"] = (
            "0"  # Ray's 15 is for shared nodes; beside anything else it starves a training
        )
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    spin_briefly()  # a local cluster's workers inherit it
    if IN_A_JOB not in os.environ:  # which has the mode and the token of its cluster
        ask_for_token(joining=bool(os.environ.get("RAY_ADDRESS")))


def ask_for_token(*, joining: bool) -> str:
    """Turn token authentication on for this process; where the token comes from, in words.

    A cluster that another started is joined with the token Ray finds by itself; one of ours has our own token. Raises
    UserError for a file that holds none, over which Ray would abort.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        with contextlib.suppress(OSError):
            if Path(named).read_text(encoding="utf-8", errors="replace").strip():
                return named
        raise UserError(f"RAY_AUTH_TOKEN_PATH names {named}, which cannot be read or is empty. Name the token's file.")
    rays_own = Path.home() / ".ray" / "auth_token"
    path = rays_own if joining and rays_own.is_file() else _token_file()
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    return str(path)


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
