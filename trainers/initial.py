"""Starting from another run's weights (`init_from`): what must agree, and what is taken over."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.config import ModelConfig, RunConfig
from trainers.errors import ConfigError

if TYPE_CHECKING:
    from trainers.checkpoint import Checkpoint
    from trainers.data.types import Tokenizer

FREE = {"dropout", "activation_checkpointing", "init_std", "dropout_positions"}  # change no tensor's shape or meaning


def initial_checkpoint(run_dir: Path) -> Checkpoint:
    """The best, else the newest, sound checkpoint of a run. Raises ConfigError where there is none."""
    from trainers.checkpoint import CheckpointStore

    found = CheckpointStore(run_dir / "checkpoints", None).best_or_latest()
    if found is None:
        raise ConfigError(f"--init-from {run_dir}: no sound checkpoint there. `orchestrate runs` lists the runs.")
    return found


def initial_hash(config: RunConfig) -> str:
    """What identifies the weights the run starts from, for the fingerprint; empty for a run from scratch.

    Raises ConfigError when they do not fit the model of `config`, naming the fields that differ.
    """
    if config.init_from is None:
        return ""
    checkpoint = initial_checkpoint(Path(config.init_from))
    theirs, ours = checkpoint.meta["model"], config.model.model_dump()
    differing = [
        f"model.{name}: {theirs.get(name)} there, {ours[name]} here"
        for name in ModelConfig.model_fields
        if name not in FREE and theirs.get(name) != ours[name]
    ]
    if differing:
        raise ConfigError(
            f"--init-from {config.init_from}: its weights belong to another architecture.\n  "
            + "\n  ".join(differing)
            + "\nTake its model settings (orchestrate show RUN prints them), or train from scratch."
        )
    return hashlib.sha256((checkpoint.path / "manifest.json").read_bytes()).hexdigest()


def initial_tokenizer(config: RunConfig) -> Tokenizer | None:
    """The tokenizer whose ids the initial weights know; None for a run from scratch. ConfigError on another kind."""
    if config.init_from is None:
        return None
    from trainers.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(Path(config.init_from) / "tokenizer")
    if tokenizer.kind != config.tokenizer.kind:
        raise ConfigError(
            f"--init-from {config.init_from}: its weights know a {tokenizer.kind} tokenizer, this configuration has "
            f"{config.tokenizer.kind}. Set tokenizer.kind={tokenizer.kind}."
        )
    return tokenizer
