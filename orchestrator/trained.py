"""A trained model as its run left it: weights, tokenizer, configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.text import Text
from torch import nn

from orchestrator.console import err
from orchestrator.runs import existing_run
from search_spaces.precisions import PRECISIONS
from trainers.checkpoint import Checkpoint, CheckpointStore
from trainers.compatibility import check_packages
from trainers.config import ModelConfig, PrecisionConfig, RunConfig
from trainers.config_io import build_config, read_yaml
from trainers.data.tokenizers import load_tokenizer
from trainers.devices import resolve_device
from trainers.errors import UserError
from trainers.manifest import committed_steps
from trainers.models import build_model
from trainers.weights import open_weights

if TYPE_CHECKING:
    from trainers.data.types import Tokenizer

NO_OPTIMIZER = {"optimizer_state": "fp32"}
"""so that nothing is asked for on behalf of one"""


@dataclass(frozen=True)
class Trained:
    """Ready to write and to be scored."""

    config: RunConfig
    model: nn.Module
    tokenizer: Tokenizer
    checkpoint: Path
    step: int
    device: torch.device
    precision: PrecisionConfig
    """what the weights are, and what to compute in"""


def open_trained(
    runs_dir: Path, name: str, *, checkpoint: str | None, device: str, precision: str | None = None
) -> Trained:
    """The model of run `name` at `checkpoint` (best, latest or a step; None: best where there is one, else latest).

    `precision` names what the weights are to be; None: as the run was trained.

    Raises UserError where the run, the checkpoint or the device is not there, CheckpointError where it is damaged.
    """
    folder = existing_run(runs_dir, name)
    target = resolve_device(device)
    config = build_config(read_yaml(folder / "config.yaml"))
    found = choose(CheckpointStore(folder / "checkpoints", None, warn=_once()), folder.name, checkpoint)
    model = build_model(ModelConfig.model_validate(found.meta["model"]), found.meta["vocab_size"])
    words = precision_asked(config, precision, folder.name)
    check_packages(words, [])
    open_weights(model, found, words, folder)
    return Trained(
        config=config,
        model=model.to(target).eval(),
        tokenizer=load_tokenizer(folder / "tokenizer"),
        checkpoint=found.path,
        step=found.step,
        device=target,
        precision=words,
    )


def precision_asked(config: RunConfig, name: str | None, run: str) -> PrecisionConfig:
    """The run's own precision, or the named one over the same adapters; of what is opened no optimizer state is kept.

    Raises UserError for an unknown name, and for int8 products over adapters.
    """
    if name is None:
        return config.precision.model_copy(update=NO_OPTIMIZER)
    if name not in PRECISIONS:
        raise UserError(f"--precision is {', '.join(PRECISIONS)}; got {name!r}.")
    words = {path.removeprefix("precision."): value for path, value in PRECISIONS[name].sets.items()}
    rank = config.precision.adapter_rank
    if rank and words["weights"] == "int8":
        raise UserError(
            f"--precision {name} multiplies whole weights in int8, and {run!r} has adapters over frozen ones: make one "
            f"model of both (orchestrate merge {run} --name {run}-whole) and score that, or say --precision int4 or "
            "bf16."
        )
    words |= {"adapter_rank": rank, "bf16_weights": False, **NO_OPTIMIZER}
    return config.precision.model_copy(update=words)


def choose(store: CheckpointStore, name: str, which: str | None) -> Checkpoint:
    """The checkpoint a person asked for, verified."""
    if which is None:
        found = store.best_or_latest()
    elif which == "latest":
        found = store.latest()
    elif which == "best":
        found = store.best()
    elif which.isdecimal() and len(which) < 16:
        found = store.at(int(which))
    else:
        raise UserError(f"--checkpoint is best, latest or a step such as 300, not {which!r}.")
    if found is None:
        what = "no checkpoint yet" if which in (None, "latest") else f"no checkpoint {which!r}"
        if damaged := committed_steps(store.directory):
            what = f"no sound checkpoint: {len(damaged)} are there, all damaged or not the one asked for"
        raise UserError(f"run {name!r} has {what}. `orchestrate status {name}` shows what it has.")
    return found


def _once() -> Callable[[str], None]:
    """Says each thing once: the best checkpoint is looked for, and then the newest, among the same ones."""
    said: set[str] = set()

    def warn(text: str) -> None:
        if text not in said:
            said.add(text)
            err().print(Text(text, style="yellow"), soft_wrap=True)

    return warn
