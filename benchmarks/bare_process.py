"""The bare loop in a process of its own: python -m benchmarks.bare_process JOB ROWS (JOB as BareJob.save left it)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks.workload import BareJob

EVERY = 10  # steps between two rows, as ours logs


def main(folder: Path, rows: Path) -> None:
    """Append a line [step, unix milliseconds, loss] to `rows` at every tenth step."""
    job = BareJob.load(folder)
    loop = job.loop()
    with rows.open("w", encoding="utf-8", buffering=1) as lines:
        for step in range(1, len(job.order) + 1):
            loop.step()
            if step % EVERY == 0:
                lines.write(json.dumps([step, time.time_ns() / 1e6, loop.losses[-1]]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
