"""The values of the `precision` axis: what each name sets, and why it may be impossible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from trainers.config import RunConfig

Device: TypeAlias = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Precision:
    """A name for a combination of the configuration's precision settings."""

    sets: Mapping[str, Any] = field(default_factory=dict)
    """dotted configuration path -> value"""
    not_on: Mapping[Device, str] = field(default_factory=dict)
    """device -> why it cannot be used there"""
    needs_base: str = ""
    """why it cannot train from scratch; empty: it can"""
    not_built: str = ""
    """why this version cannot do it at all; empty: it can"""


_NO_FP16 = "a CPU has no fast fp16 arithmetic: about 30 times slower than fp32"
_ADAPTERS = "it needs --init-from RUN, since it trains adapters over the frozen 4-bit weights of a finished run"

PRECISIONS: dict[str, Precision] = {
    "fp32": Precision({"precision.compute": "fp32"}),
    "bf16": Precision({"precision.compute": "bf16"}),
    "fp16": Precision({"precision.compute": "fp16"}, not_on={"cpu": _NO_FP16}),
    "int8": Precision(not_built="an 8-bit optimizer and int8 matrix products are not built yet"),
    "int4": Precision(needs_base=_ADAPTERS, not_built="adapters over 4-bit weights are not built yet"),
}


def refusal(name: str, config: RunConfig, device: Device) -> str | None:
    """Why a run of `config` cannot start at precision `name` (a key of PRECISIONS) on `device`; None where it can."""
    precision = PRECISIONS[name]
    base = precision.needs_base if config.init_from is None else ""
    reasons = [why for why in (precision.not_on.get(device, ""), base, precision.not_built) if why]
    return "; ".join(reasons) or None


def precision_of(config: RunConfig) -> str:
    """The name of the precision that `config` has. Every configuration has one."""
    values = {"precision.compute": config.precision.compute}
    return next(name for name, precision in PRECISIONS.items() if precision.sets == values)
