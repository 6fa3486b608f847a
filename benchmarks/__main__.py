"""python -m benchmarks [NAME ... | list | report] [--quick]: measure, and write the tables of the documentation."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys

from benchmarks.tables import write_tables

SUITES = {  # in the order they run; minutes on two idle cores
    "step_overhead": 6,
    "logging_cost": 1,
    "checkpoint_stall": 3,
    "first_step": 6,
    "orchestrated": 12,
    "packing_memory": 30,
    "memory_prediction": 20,
    "trade_offs": 13,
    "sweep_efficiency": 14,
    "sweep_scale": 6,
    "sweep_search": 9,
}
ELSEWHERE = {
    "precision_bands": "`python -m benchmarks.precision_bands --data TEXT --unseen TEXT`, 15 min",
    "gpu_suite": "one CUDA device, 8 min",
    "gpu_overhead": "one CUDA device",
    "chaos": "`make chaos`: kills and corrupts",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the named suites, or all, each in a process of its own; 1 when one of them failed to run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a suite, `list` or `report`; default: all suites")
    parser.add_argument("--quick", action="store_true", help="a rehearsal with tiny counts; its results are not kept")
    options = parser.parse_args(arguments)
    if options.names == ["list"]:
        show()
        return 0
    if options.names == ["report"]:
        write_tables()
        return 0
    unknown = [name for name in options.names if name not in SUITES | ELSEWHERE]
    if unknown:
        parser.error(f"no suite {', '.join(unknown)}. There are: {', '.join(SUITES | ELSEWHERE)}.")
    failed = [name for name in options.names or SUITES if not run(name, options.quick)]
    if not options.quick:
        write_tables()
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def show() -> None:
    for name in SUITES | ELSEWHERE:
        about = (importlib.import_module(f"benchmarks.{name}").__doc__ or "").splitlines()[0]
        needs = ELSEWHERE.get(name) or f"about {SUITES[name]} min"
        print(f"{name:18} {about} ({needs})")


def run(name: str, quick: bool) -> bool:
    """In a fresh process: what one suite leaves in memory or in threads must not weigh on the next."""
    print(f"\n== {name}", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if quick else [])]
    return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
