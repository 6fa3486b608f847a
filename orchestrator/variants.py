"""Variants: every other way to run a configuration, in precision, recompute, engine and compilation. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from search_spaces.precisions import PRECISIONS, Device
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.errors import ConfigError

ZERO_STAGES = (0, 1, 2, 3)


def ways_to_run(config: RunConfig, device: Device, left_out: list[tuple[str, str]]) -> Iterator[RunConfig]:
    """`config` first, then its variants in precision, recompute, engine and compilation; what cannot be is told why."""
    seen = [config]
    yield config
    for name, precision in PRECISIONS.items():
        for recompute, (engine, compiled) in product((False, True), _engines(config)):
            settings = [f"{path}={value}" for path, value in precision.sets.items()]
            settings += [f"model.activation_checkpointing={_word(recompute)}", *engine, f"compile={_word(compiled)}"]
            try:
                if device in precision.not_on:
                    raise ConfigError(precision.not_on[device])
                cell = override(config, settings)
            except ConfigError as error:
                reason = (f"precision={name}" + (f" {engine[0]}" if engine else ""), str(error).splitlines()[0])
                if reason not in left_out:
                    left_out.append(reason)
                continue
            if cell not in seen:
                seen.append(cell)
                yield cell


def _engines(config: RunConfig) -> Iterator[tuple[list[str], bool]]:
    """What shares the state out, and whether the model is compiled: only torch's engine with whole weights compiles."""
    whole = config.engine == "torch" and config.parallel == "ddp"
    yield [], False
    if whole:
        yield [], True
    if config.workers > 1 and whole:
        yield ["parallel=fsdp"], False
        for stage in ZERO_STAGES:
            yield ["engine=deepspeed", f"deepspeed.zero_stage={stage}"], False


def _word(yes: bool) -> str:
    return str(yes).lower()
