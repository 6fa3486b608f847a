"""Every check of the GPU paths, in the order they are made, and the process that makes them."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from benchmarks.gpu_arithmetic import ARITHMETIC
from benchmarks.gpu_check import Check, Finding
from benchmarks.gpu_memory import MEMORY
from benchmarks.gpu_packages import PACKAGED
from benchmarks.gpu_process import Died, OutOfTime, answers
from benchmarks.gpu_ranks import RANKED
from benchmarks.gpu_rig import Rig
from benchmarks.gpu_state import STATE
from benchmarks.gpu_updates import UPDATES
from trainers.devices import resolve_device

CHECKS = tuple(Check(measure) for measure in (*ARITHMETIC, *STATE, *MEMORY, *UPDATES, *RANKED, *PACKAGED))
NO_TIME = "the time was up before it"


@dataclass(frozen=True)
class Order:
    """What the process is to check; JSON."""

    names: tuple[str, ...]
    device: str
    folder: str
    tiny: bool

    @property
    def rig(self) -> Rig:
        return Rig(resolve_device(self.device), Path(self.folder), self.tiny)


def examine(
    checks: Sequence[Check], device: str, folder: Path, *, tiny: bool, seconds: float, say: Callable[[Finding], None]
) -> list[Finding]:
    """A finding for every check, made one after the other in a process of their own, for at most so many seconds.

    One that kills its process is a failure, and the next ones get a fresh process; so they do on CUDA after every
    failure, for an error there may have spoilt the device for this process.
    """
    left, until = list(checks), monotonic() + seconds
    findings: list[Finding] = []

    def end(finding: Finding) -> None:
        findings.append(finding)
        left.pop(0)
        say(finding)

    while left:
        order = Order(tuple(check.name for check in left), device, str(folder), tiny)
        before = len(left)
        try:
            for line in answers("benchmarks.gpu_checks", json.dumps(vars(order)), until - monotonic(), DETERMINISTIC):
                end(Finding.from_json(json.loads(line)))
        except OutOfTime:
            for check in list(left):
                end(check.ended("skipped", NO_TIME))
        except Died as died:
            end(left[0].ended("fail", f"its process ended: {died}"))
        assert len(left) < before, "a process that answered nothing"
    return findings


DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""of cuBLAS, which reads it once: some of the checks compare bits"""


# ---- the process --------------------------------------------------------------------------------------------------


def main() -> int:
    """Make the checks that standard input names, and write each finding as a line."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no finding
    question: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    order = Order(**{**question, "names": tuple(question["names"])})
    with os.fdopen(out, "w", encoding="utf-8") as lines:
        for finding in made(order):
            lines.write(json.dumps(finding.to_json()) + "\n")
            lines.flush()
    return 0


def made(order: Order) -> Iterator[Finding]:
    """The findings, one after the other; on CUDA none after a failure."""
    rig, known = order.rig, {check.name: check for check in CHECKS}
    for name in order.names:
        finding = known[name].found(rig)
        yield finding
        if rig.cuda:
            if finding.verdict == "fail":
                return
            torch.cuda.empty_cache()


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
