"""Which words of precision go together, and why the others do not: rules that hold on every machine.

What a certain machine lacks (a package, a kind of GPU) is found out there: `trainers.devices.check_precision`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from trainers.config_training import OptimConfig, PrecisionConfig
from trainers.errors import ConfigError

EIGHT_BIT = ("adamw", "lion", "ademamix", "sgd")
ROUNDED = ("adamw", "lion", "ademamix")

_NO_EIGHT_BIT = {
    "adam": "bitsandbytes decays the weights of its 8-bit adam as adamw does, not through the gradient",
    "rmsprop": "bitsandbytes keeps no momentum in its 8-bit rmsprop",
}


def conflicts(
    precision: PrecisionConfig, optims: Sequence[OptimConfig], *, device: str, init_from: str | None
) -> list[str]:
    """What does not go together, a sentence each with the way out; empty where all of it does.

    `optims` are those of the run and of its phases.
    """
    return [
        *_weights(precision, init_from),
        *_optimizers(precision, optims),
        *(
            ["precision.tf32 is arithmetic of CUDA GPUs, and device=cpu has none: leave it out."]
            if precision.tf32 and device == "cpu"
            else []
        ),
    ]


def _weights(precision: PrecisionConfig, init_from: str | None) -> list[str]:
    if precision.weights == "nf4" and init_from is None:
        return [
            "precision.weights=nf4 (--precision int4) needs --init-from RUN: 4-bit weights cannot be trained, so it "
            "trains adapters over the frozen weights of a finished run. Train one first, with --precision bf16 or int8."
        ]
    found = []
    if precision.adapter_rank and init_from is None:
        found.append(
            f"precision.adapter_rank={precision.adapter_rank} trains adapters over frozen weights: give the run they "
            "come from with --init-from RUN, or set precision.adapter_rank=0."
        )
    if precision.weights == "nf4" and not precision.adapter_rank:
        found.append(
            "precision.weights=nf4 freezes the weights, so there is nothing to train without adapters: set "
            "precision.adapter_rank=16, or say --precision int4."
        )
    if precision.weights == "int8" and precision.adapter_rank:
        found.append(
            "precision.weights=int8 trains the weights themselves, which adapters freeze: set precision.weights=nf4 "
            "or native, or precision.adapter_rank=0."
        )
    if precision.bf16_weights:
        found += _bf16_weights(precision)
    return found


def _bf16_weights(precision: PrecisionConfig) -> list[str]:
    found = []
    if precision.compute != "bf16":
        found.append(f"precision.bf16_weights needs precision.compute=bf16, not {precision.compute}.")
    if precision.weights != "native":
        found.append(
            f"precision.bf16_weights keeps the weights in bf16, and weights={precision.weights} wants more: int8 "
            "rounds master weights of fp32, nf4 is a form of its own. Set precision.weights=native."
        )
    if precision.adapter_rank:
        found.append("precision.bf16_weights is for training all weights: set precision.adapter_rank=0.")
    return found


def _optimizers(precision: PrecisionConfig, optims: Sequence[OptimConfig]) -> list[str]:
    found = []
    for optim in optims:
        if precision.optimizer_state == "int8":
            found += _eight_bit(optim)
        elif optim.paged:
            found.append("optim.paged pages the 8-bit state: set precision.optimizer_state=int8, or optim.paged=false.")
        if precision.bf16_weights and optim.name not in ROUNDED:
            found.append(
                f"precision.bf16_weights rounds the updates of {', '.join(ROUNDED)}, not of optim.name={optim.name}: "
                "nearest rounding would lose small updates."
            )
    return list(dict.fromkeys(found))


def _eight_bit(optim: OptimConfig) -> list[str]:
    if optim.name in _NO_EIGHT_BIT:
        return [
            f"precision.optimizer_state=int8 with optim.name={optim.name}: {_NO_EIGHT_BIT[optim.name]}. "
            f"Set optim.name to one of {', '.join(EIGHT_BIT)}."
        ]
    if optim.name == "sgd" and not optim.momentum:
        return ["precision.optimizer_state=int8 with optim.momentum=0: there is no state to keep in 8 bits."]
    return []


def check_packages(precision: PrecisionConfig, optims: Sequence[OptimConfig]) -> None:
    """Refuse what needs a package that is not installed: ConfigError. Imports none of them."""
    needs: dict[str, str] = {}
    if any(optim.name in ("lion", "ademamix") for optim in optims):
        needs["bitsandbytes"] = f"optim.name={next(o.name for o in optims if o.name in ('lion', 'ademamix'))}"
    if precision.optimizer_state == "int8":
        needs["bitsandbytes"] = "precision.optimizer_state=int8"
    if precision.weights == "nf4":
        needs["bitsandbytes"] = "precision.weights=nf4"
    if precision.adapter_rank:
        needs["peft"] = f"precision.adapter_rank={precision.adapter_rank}"
    for package, what in needs.items():
        if find_spec(package) is None:
            raise ConfigError(f"{what} needs the package {package}, which is not installed: pip install {package}.")
