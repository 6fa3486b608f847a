"""What this machine cannot train, refused before anything starts."""

from __future__ import annotations

import os

from orchestrator.console import count, size
from orchestrator.plan import BYTES_PER_VALUE
from orchestrator.presets_table import closed_form_parameters
from trainers.compatibility import check_packages
from trainers.config import PrecisionConfig, RunConfig
from trainers.deepspeed_config import check_deepspeed
from trainers.errors import UserError


def check_device(config: RunConfig) -> None:
    """Refuse early what this machine's device cannot compute; on a cluster the workers find out. Raises UserError."""
    if os.environ.get("RAY_ADDRESS"):
        return
    check_packages(config.precision, [phase.optim for phase in config.resolved_phases()])
    check_deepspeed(config, "cpu" if config.device == "auto" else config.device)
    if config.precision == PrecisionConfig() and config.device in ("auto", "cpu"):
        return  # certain, without importing torch
    from trainers.devices import check_precision, resolve_device

    check_precision(config.precision, resolve_device(config.device))


def check_model(config: RunConfig, vocab_size: int) -> None:
    """Refuse a model whose embedding is too small or whose weights this machine cannot hold. Raises UserError."""
    table = config.model.vocab_size or vocab_size
    if table < vocab_size:
        raise UserError(
            f"model.vocab_size ({table}) is smaller than the tokenizer's vocabulary ({vocab_size}): "
            f"raise it to at least {vocab_size}, or leave it out."
        )
    if os.environ.get("RAY_ADDRESS"):
        return
    parameters = closed_form_parameters(config.model, table)
    needed = parameters * BYTES_PER_VALUE * config.workers
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"the model has {count(parameters)} parameters: its weights alone need {size(needed)} in "
            f"{config.workers} worker{'s' if config.workers > 1 else ''}, and this machine has {size(there)} of "
            "memory. Lower model.d_model, model.n_layers or --workers."
        )
