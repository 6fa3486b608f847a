"""The bare loop in a process of its own: python -m benchmarks.bare_process FOLDER (as BareJob.save left it)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks.workload import BareJob

EVERY = 10  # steps between two rows, as ours logs


def main(folder: Path) -> None:
    """Print one JSON line: `rows` of [step, unix milliseconds] and the losses at the same steps."""
    job = BareJob.load(folder)
    loop, rows = job.loop(), []
    for step in range(1, len(job.order) + 1):
        loop.step()
        if step % EVERY == 0:
            rows.append([step, time.time_ns() / 1e6])
    print(json.dumps({"rows": rows, "losses": loop.losses}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
