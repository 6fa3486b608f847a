"""One GPU in eight minutes: every GPU path checked, and the bench tables of three presets, eager and compiled.

Needs torch, numpy, pydantic, pyyaml and safetensors alone; bitsandbytes, peft and DeepSpeed are covered where they are
installed. `--device cpu --tiny` rehearses the same lines anywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.gpu_check import Finding
from benchmarks.gpu_checks import CHECKS, examine
from benchmarks.gpu_memory import BAND
from benchmarks.gpu_table import Measured, Table, cells
from benchmarks.measure import Figure, report
from benchmarks.workload import scratch
from trainers.devices import resolve_device
from trainers.errors import UserError

CLOCK_S = 480.0
CHECKS_SHARE = 0.6  # of the clock, at most: the tables want the rest


def main(arguments: list[str] | None = None) -> int:
    """0 where every check passed or was skipped and no cell failed, 1 otherwise, 2 for bad input."""
    options = _options(arguments)
    began = time.monotonic()
    try:
        if resolve_device(options.device).type == "cpu" and not options.tiny:
            raise UserError("the presets are too large for a CPU: --device cpu --tiny rehearses the suite.")
        checks = [check for check in CHECKS if not options.checks or check.name in options.checks]
        if unknown := set(options.checks) - {check.name for check in CHECKS}:
            raise UserError(f"no check {', '.join(sorted(unknown))}. There are: {', '.join(c.name for c in CHECKS)}.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with scratch() as folder:
        findings = examine(
            checks,
            options.device,
            folder,
            tiny=options.tiny,
            seconds=CHECKS_SHARE * options.seconds,
            say=_say_finding,
        )
        table = Table(options.device, folder, options.tiny)
        wanted = [] if options.checks_only else cells()
        left = options.seconds - (time.monotonic() - began)
        measured = list(table.measured(wanted, left, _say_cell))
    seconds = time.monotonic() - began
    report(
        "gpu_suite",
        [*figures_of(findings, measured, seconds, options.seconds), *card_figures(measured, options.device)],
        quick=options.tiny or bool(options.checks) or options.checks_only,
        path=options.json,
        device=options.device,
        tiny=options.tiny,
        checks=[finding.to_json() for finding in findings],
        cells=[cell.to_json() for cell in measured],
    )
    return 1 if failed(findings, measured) else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", "--quick", action="store_true", help="a rehearsal with tiny models, not kept")
    parser.add_argument("--seconds", type=float, default=CLOCK_S, help="what is left then is skipped (default 480)")
    parser.add_argument("--checks", nargs="*", default=[], metavar="NAME", help="these alone; default: all")
    parser.add_argument("--checks-only", action="store_true", help="no tables")
    parser.add_argument("--json", type=Path, help="a file for the results, instead of results/gpu_suite.json")
    return parser.parse_args(arguments)


def failed(findings: Sequence[Finding], measured: Sequence[Measured]) -> list[str]:
    """Names of the checks and cells that did not do what they should."""
    return [
        *(finding.name for finding in findings if finding.verdict == "fail"),
        *(f"{cell.preset} {cell.way}" for cell in measured if cell.fate == "failed"),
    ]


def figures_of(
    findings: Sequence[Finding], measured: Sequence[Measured], seconds: float, clock_s: float
) -> list[Figure]:
    """The suite in a few lines; the rest stands beside them in the results."""
    verdicts, fates = Counter(f.verdict for f in findings), Counter(cell.fate for cell in measured)
    return [
        Figure("checks passed", verdicts["pass"], f"of {len(findings)}"),
        Figure("checks skipped, each with its reason", verdicts["skipped"], ""),
        Figure("checks failed", verdicts["fail"], "", bar=0),
        Figure("cells measured", fates["ok"], f"of {len(measured)}"),
        Figure("cells failed", fates["failed"], "", bar=0),
        Figure("wall-clock time", seconds, "s", bar=clock_s),
    ]


def card_figures(measured: Sequence[Measured], device: str) -> list[Figure]:
    """What the cells say together: the rate that they are held against, and how well their memory was planned."""
    products = [cell.product_flops for cell in measured if cell.product_flops]
    errors = [cell.plan_error for cell in measured if cell.plan_error is not None]
    figures = []
    if products:
        figures.append(Figure("matrix product, the median of all cells", median(products) / 1e12, "TFLOP/s"))
    if errors and device == "cuda":  # on a CPU a peak is the whole process's
        figures.append(Figure("planned memory, eager cells: largest error", max(errors), "", bar=BAND))
    return figures


def _say_finding(finding: Finding) -> None:
    reason = f": {finding.reason}" if finding.reason else ""
    print(f"  {finding.verdict:8} {finding.name} ({finding.seconds:.1f} s){reason}", flush=True)


def _say_cell(cell: Measured) -> None:
    what = f"  {cell.fate:8} {cell.preset}, {cell.way}, {cell.rows} rows"
    if cell.tokens_per_s is None or cell.utilisation is None:
        print(f"{what}: {cell.reason}", flush=True)
        return
    peak = (cell.peak_bytes or 0) / 2**30
    rate = f"{cell.tokens_per_s:,.0f} tokens/s, {cell.step_ms:,.1f} ms, {peak:.2f} GiB"
    print(f"{what}: {rate}, {cell.utilisation:.1%} of the matrix product", flush=True)


if __name__ == "__main__":
    sys.exit(main())
