"""A Run to try something on: the real model, data and optimizer in a folder that goes away with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainers.config import RunConfig
from trainers.context import LocalContext
from trainers.loop import Builder
from trainers.models import build_model
from trainers.phase import ActivePhase
from trainers.run import Run


@contextmanager
def scratch_run(
    config: RunConfig, cache_dir: Path, *, build: Builder = build_model
) -> Iterator[tuple[Run, ActivePhase]]:
    """A run at its first step, in its first phase, with the weights of `init_from` where there is one.

    It stands as `train` would begin it, the memory for its first save set aside too. What it writes goes into a
    temporary folder; only `cache_dir` (packed text, tokenizers) keeps anything. Raises UserError as `train` does.
    """
    with tempfile.TemporaryDirectory(prefix="scratch-run-") as folder:
        ctx = LocalContext(Path(folder) / "run", cache_dir)
        try:
            run = Run(config, ctx, build)
            try:
                run.restore()
                phase = run.open_phase()
                try:
                    yield run, phase
                finally:
                    phase.loader.close()
            finally:
                run.close()
        finally:
            ctx.close()
