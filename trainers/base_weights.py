"""The frozen weights under a run's adapters: linked into the run's own folder when it begins.

    RUNS/NAME/base/step-00000300/...     the checkpoint of the run it came from (hard links: no second copy on disk)

So the run it came from may train on, drop its checkpoints or go. Every checkpoint of adapters names the base by the
SHA-256 of its manifest.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from trainers.errors import CheckpointError
from trainers.initial import initial_checkpoint
from trainers.manifest import MANIFEST, Checkpoint, file_sha256, newest

FOLDER = "base"


def base_checkpoint(run_dir: Path, init_from: str | None) -> Checkpoint:
    """The base in the run's own folder, or, where it has not begun, the best checkpoint of the run it comes from.

    Raises ConfigError or CheckpointError where there is none.
    """
    own = newest(run_dir / FOLDER)
    if own is not None:
        return own
    if init_from is None:
        raise CheckpointError(f"{run_dir / FOLDER} holds no sound checkpoint: the weights under the adapters are lost.")
    return initial_checkpoint(Path(init_from))


def keep_base(base: Checkpoint, run_dir: Path) -> None:
    """Make `base` the run's own: links, or copies where the file system has none. Safe to repeat."""
    final = run_dir / FOLDER / base.path.name
    if final.exists():
        return
    staging = final.with_name(f".tmp-{base.path.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name in [*base.manifest.files, MANIFEST]:
        try:
            os.link(base.path / name, staging / name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(base.path / name, staging / name)
    os.rename(staging, final)


def identified(base: Checkpoint) -> dict[str, Any]:
    """What a checkpoint of adapters says of its base: JSON."""
    return {"step": base.step, "manifest_sha256": file_sha256(base.path / MANIFEST)}


def check_base(said: Any, base: Checkpoint, where: Path) -> None:
    """Refuse adapters (at `where`, which say `said` of their base) over another base: CheckpointError."""
    if said != identified(base):
        raise CheckpointError(f"{where} holds adapters over other weights than {base.path}: they do not go together.")
