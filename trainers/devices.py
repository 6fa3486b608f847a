"""Which device a run computes on, and what it may compute there."""

from __future__ import annotations

import os

import torch

from trainers.compatibility import check_packages
from trainers.config import PrecisionConfig, RunConfig
from trainers.deepspeed_config import check_deepspeed
from trainers.errors import ConfigError, UserError


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `name` (auto, cpu, cuda or mps) means for this worker; UserError where it is not there.

    `auto` takes CUDA, then Apple's MPS, then the CPU. `local_rank` picks the GPU among those of this machine.
    MPS could not be run by the authors; it follows the same path as the CPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        return _cuda(local_rank)
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device=mps needs an Apple GPU, and torch finds none here. Use device=auto or device=cpu.")
        return torch.device("mps")
    raise UserError(f"device must be auto, cpu, cuda or mps, not {name!r}.")


def _cuda(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        why = "this torch is built for the CPU" if torch.version.cuda is None else "no usable NVIDIA GPU or driver"
        raise UserError(f"device=cuda, but torch finds no CUDA device ({why}). Use device=auto or device=cpu.")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"worker {local_rank} of this machine has no GPU: {count} visible, one needed for each worker. "
            f"Use --workers {count} or make more GPUs visible (CUDA_VISIBLE_DEVICES)."
        )
    return torch.device("cuda", local_rank)


def check_machine(config: RunConfig, device: torch.device | str) -> None:
    """Refuse a precision that `device` cannot do or that needs a package this machine lacks: ConfigError."""
    check_precision(config.precision, device)
    check_packages(config.precision, [phase.optim for phase in config.resolved_phases()])
    check_deepspeed(config, device if isinstance(device, str) else device.type)


def check_precision(precision: PrecisionConfig, device: torch.device | str) -> None:
    """Refuse a compute precision that `device` (a device, or its type as text) cannot sensibly do: ConfigError.

    Takes text so that a plan can be checked where the device is not.
    """
    kind = device if isinstance(device, str) else device.type
    if precision.compute == "fp16" and kind == "cpu":
        raise ConfigError(
            "precision.compute=fp16 on a CPU is about 30 times slower than fp32: CPUs have no fast fp16 arithmetic. "
            "Use precision.compute=bf16 (faster than fp32 on recent CPUs) or fp32."
        )
    if precision.tf32 and kind != "cuda":
        raise ConfigError(f"precision.tf32 is arithmetic of CUDA GPUs, not of this {kind} device: leave it out.")
    if precision.weights == "int8" and kind == "mps":
        raise ConfigError("precision.weights=int8 has no kernels on MPS: set precision.weights=native.")
    if kind == "mps" and (precision.weights == "nf4" or precision.optimizer_state == "int8"):
        raise ConfigError(
            "bitsandbytes has no kernels for MPS: set precision.weights=native and precision.optimizer_state=fp32, "
            "or device=cpu."
        )
    if precision.compute == "bf16" and isinstance(device, torch.device) and kind == "cuda":
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if not supported:
            raise ConfigError(
                f"precision.compute=bf16 needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}. Use precision.compute=fp16 or fp32."
            )


def set_tf32(enabled: bool) -> None:
    """Let fp32 matrix products on CUDA round their factors to TF32 (10 bits of mantissa), or not, in this process."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def set_determinism(enabled: bool) -> None:
    """Make torch choose deterministic kernels, or its fastest, in this whole process.

    Call before the first matrix product on a GPU: cuBLAS reads its workspace setting when it starts. On the CPU the
    kernels used here are deterministic either way (for one thread count).
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    # a debugging aid that would write every buffer twice
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = False
