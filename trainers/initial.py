"""Starting from another run's weights (`init_from`): what must agree, and what is taken over.

Once a run has begun, with a checkpoint of its own, its folder has all that it took: the run it came from may change
or go away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.config import ModelConfig, RunConfig
from trainers.errors import ConfigError
from trainers.identity import read_identity, saved_step

if TYPE_CHECKING:
    import numpy as np

    from trainers.checkpoint import Checkpoint
    from trainers.data.types import Tokenizer

FREE = {"dropout", "activation_checkpointing", "init_std", "dropout_positions"}  # change no tensor's shape or meaning
UNKNOWN_LIMIT = 0.1  # share of unknown tokens beyond which training could only teach the model to write <UNK>
UNKNOWN_SAMPLE = 1 << 22  # tokens of each text that are looked at


def initial_checkpoint(run_dir: Path) -> Checkpoint:
    """The best, else the newest, sound checkpoint of a run. Raises ConfigError where there is none."""
    from trainers.checkpoint import CheckpointStore

    found = CheckpointStore(run_dir / "checkpoints", None).best_or_latest()
    if found is None:
        raise ConfigError(f"--init-from {run_dir}: no sound checkpoint there. `orchestrate runs` lists the runs.")
    if found.meta.get("base") is not None:
        raise ConfigError(
            f"--init-from {run_dir}: it holds adapters over the weights of another run. Make one model of both first: "
            f"orchestrate merge {run_dir.name} --name {run_dir.name}-merged"
        )
    return found


def initial_hash(config: RunConfig, run_dir: Path | None = None) -> str:
    """What identifies the weights the run starts from, for the fingerprint; empty for a run from scratch.

    `run_dir` is the run's own folder: where it has begun, what it began with counts. Raises ConfigError when the
    weights do not fit the model of `config`, naming the fields that differ.
    """
    if config.init_from is None:
        return ""
    if run_dir is not None and has_begun(config, run_dir):
        return str((read_identity(run_dir) or {})["fields"]["init_from"])
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


def has_begun(config: RunConfig, run_dir: Path) -> bool:
    """Whether the run in `run_dir` has a checkpoint of its own and came from the weights that `config` names."""
    identity = read_identity(run_dir) or {}
    came_from = identity.get("init_from") if identity.get("fields", {}).get("init_from") else None
    return came_from is not None and came_from == config.init_from and saved_step(run_dir) > 0


def initial_tokenizer(config: RunConfig, run_dir: Path | None = None) -> Tokenizer | None:
    """The tokenizer whose ids the initial weights know; None for a run from scratch. ConfigError on another kind.

    `run_dir` is the run's own folder: where it has begun, its own copy counts.
    """
    if config.init_from is None:
        return None
    from trainers.data.tokenizers import load_tokenizer

    if run_dir is not None and has_begun(config, run_dir):
        return load_tokenizer(run_dir / "tokenizer")
    tokenizer = load_tokenizer(Path(config.init_from) / "tokenizer")
    if tokenizer.kind != config.tokenizer.kind:
        raise ConfigError(
            f"--init-from {config.init_from}: its weights know a {tokenizer.kind} tokenizer, this configuration has "
            f"{config.tokenizer.kind}. Set tokenizer.kind={tokenizer.kind}."
        )
    return tokenizer


def unknown_share(tokenizer: Tokenizer, texts: Iterable[np.ndarray]) -> float:
    """The share of tokens that stand for text the tokenizer does not know, in the beginnings of packed texts."""
    from trainers.data.tokenizers import UNK

    if tokenizer.kind in ("bytes", "bpe"):  # any byte is known to them
        return 0.0
    beginnings = [text[:UNKNOWN_SAMPLE] for text in texts]
    unknown = sum(int((text == UNK).sum()) for text in beginnings)
    return unknown / max(1, sum(map(len, beginnings)))


def unknown_note(config: RunConfig, share: float) -> str | None:
    """A sentence about text that the initial weights' tokenizer does not know; None where it knows all of it.

    Raises ConfigError beyond UNKNOWN_LIMIT.
    """
    if share == 0:
        return None
    fact = f"{share:.1%} of the text is unknown to the tokenizer of {config.init_from}"
    if share > UNKNOWN_LIMIT:
        raise ConfigError(
            f"{fact}, and would all be the same <UNK> to the model (at most {UNKNOWN_LIMIT:.0%} is accepted). Start "
            f"from a run whose tokenizer knows this text (bytes and bpe know any), or train from scratch."
        )
    return f"{fact}: those characters are all the same <UNK> to the model."
