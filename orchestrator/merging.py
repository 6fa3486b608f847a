"""`orchestrate merge`: adapters and the weights under them as one run of plain weights."""

from __future__ import annotations

import json as json_text
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from orchestrator.claimed import make_folder
from orchestrator.console import count, out, print_json
from orchestrator.experiment import confined
from orchestrator.runs import existing_run, name_in
from trainers.config import RunConfig
from trainers.errors import UserError
from trainers.identity import MERGED

if TYPE_CHECKING:
    from orchestrator.trained import Trained

PLAIN = {"weights": "native", "optimizer_state": "fp32", "adapter_rank": 0}
UNPAGED = {"paged": False}
"""pages belong to 8-bit state"""
KEPT = ("progress", "environment", "model", "vocab_size", "tokenizer")


def merge_run(*, run: str, name: str, checkpoint: str | None, runs_dir: Path, json: bool) -> int:
    """Write the run NAME, whose only checkpoint computes what the adapted model of `run` does; the exit code.

    Raises UserError for a run without adapters and a name that is taken.
    """
    source = existing_run(runs_dir, run)  # a misspelt name is told before torch is imported
    target = confined(runs_dir, name)
    if target.exists():
        raise UserError(f"{target} is there already: choose another --name.")
    from orchestrator.trained import open_trained

    trained = open_trained(runs_dir, run, checkpoint=checkpoint, device="cpu")
    if not trained.config.precision.adapter_rank:
        raise UserError(f"run {name_in(runs_dir, run)!r} has no adapters to merge: its weights are whole as they are.")
    make_folder(target)
    try:
        _write(trained, source, target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    if json:
        print_json({"run": name, "merged_from": name_in(runs_dir, run), "step": trained.step, "folder": str(target)})
    else:
        out().print(
            Text(
                f"{name}: {name_in(runs_dir, run)} at step {count(trained.step)} as plain weights.\n"
                f"orchestrate generate {name}, orchestrate evaluate {name} and --init-from {name} take it as any run."
            ),
            soft_wrap=True,
        )
    return 0


def _write(trained: Trained, source: Path, target: Path) -> None:
    from trainers.adapters import merged_weights
    from trainers.checkpoint import CheckpointStore
    from trainers.config_io import dump_yaml
    from trainers.context import LocalContext
    from trainers.manifest import read_checkpoint
    from trainers.progress import Outcome
    from trainers.run import write_outcome

    meta = read_checkpoint(trained.checkpoint.parent, trained.step, verify=False).meta
    config = plain_config(trained.config)
    context = LocalContext(target)
    try:
        (target / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        (target / "identity.json").write_text(
            json_text.dumps(_identity(config, source, target), indent=1) + "\n", encoding="utf-8"
        )
        shutil.copytree(source / "tokenizer", target / "tokenizer")
        store = CheckpointStore(target / "checkpoints", context.guard)
        kept = {key: meta[key] for key in KEPT}
        store.save(trained.step, {"model": merged_weights(trained.model)}, kept, best=True, wait=True)
        store.close()
        if store.last_error is not None:
            raise UserError(f"the merged weights could not be saved: {store.last_error}")
        told = meta["progress"]
        write_outcome(context, Outcome("finished", MERGED, trained.step, told["tokens"], told["last"]))
    finally:
        context.close()


def plain_config(config: RunConfig) -> RunConfig:
    """The configuration of a run as it is without adapters: one that can be opened, and trained with."""
    values = config.model_dump()
    values["precision"] |= PLAIN
    for part in [values, *values["phases"]]:
        if part["optim"] is not None:
            part["optim"] |= UNPAGED
    return RunConfig.model_validate(values)


def _identity(config: RunConfig, source: Path, target: Path) -> dict[str, Any]:
    from trainers.config_io import fingerprint, fingerprint_fields
    from trainers.identity import read_identity

    told = read_identity(source) or {}
    fields = told.get("fields", {})
    hashes = [value for key, value in fields.items() if key.startswith("data.hashes.")]
    start = str(fields.get("init_from") or "")
    return {
        "created": told.get("created"),
        "name": target.name,
        "fingerprint": fingerprint(config, hashes, start),
        "fields": fingerprint_fields(config, hashes, start),
        "init_from": config.init_from,
        "merged_from": str(source),
    }
