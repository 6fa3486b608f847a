"""The values of the `precision` axis: what each name sets, and why it may be impossible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

from trainers.compatibility import conflicts
from trainers.config import RunConfig

Device: TypeAlias = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Precision:
    """A name for a combination of the configuration's precision settings."""

    sets: Mapping[str, Any]
    """dotted configuration path -> value"""
    not_on: Mapping[Device, str] = field(default_factory=dict)
    """device -> why it cannot be used there"""
    needs_base: str = ""
    """why it cannot train from scratch; empty: it can"""
    packages: tuple[str, ...] = ()
    """what it needs besides torch"""


def _words(
    compute: str, weights: str = "native", optimizer_state: str = "fp32", adapter_rank: int = 0
) -> dict[str, Any]:
    return {
        "precision.compute": compute,
        "precision.weights": weights,
        "precision.optimizer_state": optimizer_state,
        "precision.adapter_rank": adapter_rank,
    }


_NO_FP16 = "a CPU has no fast fp16 arithmetic: about 30 times slower than fp32"
_NO_BITSANDBYTES = "bitsandbytes has no kernels for MPS"
_ADAPTERS = "it needs --init-from RUN, since it trains adapters over the frozen 4-bit weights of a finished run"

PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(_words("fp32")),
    "bf16": Precision(_words("bf16")),
    "fp16": Precision(_words("fp16"), not_on={"cpu": _NO_FP16}),
    "int8": Precision(_words("bf16", "int8", "int8"), not_on={"mps": _NO_BITSANDBYTES}, packages=("bitsandbytes",)),
    "int4": Precision(
        _words("bf16", "nf4", adapter_rank=16),
        not_on={"mps": _NO_BITSANDBYTES},
        needs_base=_ADAPTERS,
        packages=("bitsandbytes", "peft"),
    ),
}


def refusal(name: str, config: RunConfig, device: Device, *, packages: bool = True) -> str | None:
    """Why a run of `config` cannot start at precision `name` (a key of PRECISIONS) on `device`; None where it can.

    `packages`: this machine's count; not so where another is to run it.
    """
    precision = PRECISIONS[name]
    base = precision.needs_base if config.init_from is None else ""
    missing = [package for package in precision.packages if find_spec(package) is None] if packages else []
    absent = f"it needs {' and '.join(missing)}: pip install {' '.join(missing)}" if missing else ""
    reasons = [why for why in (precision.not_on.get(device, ""), base, absent) if why]
    if not reasons:
        reasons = _clashes(precision, config)
    return "; ".join(reasons) or None


def _clashes(precision: Precision, config: RunConfig) -> list[str]:
    """What else in `config` does not go with it, such as an optimizer without 8-bit state."""
    words = {path.removeprefix("precision."): value for path, value in precision.sets.items()}
    optims = [phase.optim for phase in config.resolved_phases()]
    asked = config.precision.model_copy(update=words)
    return conflicts(asked, optims, device=config.device, init_from=config.init_from)


def precision_of(config: RunConfig) -> str:
    """The name of the precision that `config` has; where it has none, its words: `fp32/native/int8`."""
    own = config.precision
    for name, precision in PRECISIONS.items():
        if all(getattr(own, path.removeprefix("precision.")) == value for path, value in precision.sets.items()):
            return name
    return f"{own.compute}/{own.weights}/{own.optimizer_state}"
