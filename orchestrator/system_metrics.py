"""What the driver's machine is doing, under the names that MLflow's own monitor uses.

That monitor ends for good at the first moment the store is away, asks for the run at each sample and keeps what it
could not send nowhere. So only its names are used: the reading is here, and the feeder sends.
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import psutil

MEGA = 1e6


def system_interval_s() -> float | None:
    """Seconds between samples; None where MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING says no."""
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").strip().lower() in ("false", "0"):
        return None
    return float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or 10.0)


class SystemMeter:
    """Samples of CPU, memory, disk, network and NVIDIA GPUs; a sample costs well under a millisecond."""

    def __init__(self) -> None:
        node = os.environ.get("MLFLOW_SYSTEM_METRICS_NODE_ID")
        self._prefix = f"system/{node}/" if node else "system/"
        self._network_before = psutil.net_io_counters()
        self._nvml = import_module("pynvml") if find_spec("pynvml") else None  # nvidia-ml-py: not everywhere
        self._gpus = _gpu_handles(self._nvml)
        psutil.cpu_percent()  # the first reading has no interval to be a share of

    def sample(self, step: int) -> dict[str, Any]:
        """A row like those of metrics.jsonl; `step` counts samples, as MLflow does."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGA,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MEGA,
            "disk_available_megabytes": disk.free / MEGA,
        }
        if network is not None and self._network_before is not None:  # None: a machine without any interface
            values["network_receive_megabytes"] = (network.bytes_recv - self._network_before.bytes_recv) / MEGA
            values["network_transmit_megabytes"] = (network.bytes_sent - self._network_before.bytes_sent) / MEGA
        for index, handle in enumerate(self._gpus):
            values |= {f"gpu_{index}_{name}": value for name, value in _gpu_values(self._nvml, handle).items()}
        stamp: dict[str, Any] = {"step": step, "time_ms": time.time_ns() // 1_000_000}
        return stamp | {self._prefix + name: round(value, 1) for name, value in values.items()}


def _gpu_handles(nvml: Any) -> list[Any]:
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # the library is there and no driver
        return []
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]


def _gpu_values(nvml: Any, handle: Any) -> dict[str, float]:
    """Memory, power and use of one GPU, as far as it tells (a MIG slice keeps its use to itself)."""
    values: dict[str, float] = {}
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        values["memory_usage_megabytes"] = memory.used / MEGA
        values["memory_usage_percentage"] = 100 * memory.used / memory.total
        values["power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        values["utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
    except nvml.NVMLError:
        return values
    return values
