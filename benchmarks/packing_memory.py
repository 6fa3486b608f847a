"""Packing and training on a 2 GB text: anonymous memory above what the same run takes on a 2 MB text."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.measure import Figure, report
from benchmarks.workload import QUIET, scratch
from trainers.config import SourceConfig
from trainers.config_io import dump_yaml, override
from trainers.data.corpora import open_corpus
from trainers.presets import PRESETS

BAR_MB = 1000.0
SAMPLE_S = 0.02
SIZES = {"small": 2_000_000, "large": 2_000_000_000}
TOKENIZERS: dict[str, tuple[str, ...]] = {
    "characters": (),
    "bpe": ("tokenizer.kind=bpe", "tokenizer.vocab_size=8000"),
}


def write_text(path: Path, size_bytes: int) -> None:
    """Source code and prose, its lines dealt out anew every few megabytes among lines of words never seen before.

    New words matter: the memory of a tokenizer's training grows with them. Here they come at 20,000 in 5 MB, which is
    a million in the 200 MB that a tokenizer may be trained on.
    """
    corpus = "".join(open_corpus(SourceConfig(corpus="python-stdlib")).documents())
    lines = corpus[: 4 << 20].encode().splitlines(keepends=True)
    rng = np.random.default_rng(0)
    written = 0
    with path.open("wb") as file:
        while written < size_bytes:
            block = np.array(lines + _new_lines(rng), dtype=object)
            text = b"".join(rng.permutation(block))[: size_bytes - written]
            file.write(text)
            written += len(text)


def _new_lines(rng: np.random.Generator) -> list[bytes]:
    """2,500 lines of eight words of nine random letters."""
    letters = rng.integers(ord("a"), ord("z") + 1, (2500, 80), dtype=np.uint8)
    letters[:, 9::10] = ord(" ")
    letters[:, -1] = ord("\n")
    return [line.tobytes() for line in letters]


@dataclass
class Peak:
    """Greatest memory of a process and all its children together, in bytes, and when."""

    anonymous: int = 0
    """RssAnon: what is its own, not pages of mapped files"""
    resident: int = 0
    seconds: float = 0.0
    wall_s: float = 0.0
    samples: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, anonymous bytes), one a second at most"""


def watch(process: subprocess.Popen[str]) -> Peak:
    """Look at the process tree until it ends."""
    peak, started = Peak(), time.perf_counter()
    while process.poll() is None:
        anonymous, resident = (sum(column) for column in zip(*map(_memory, _tree(process.pid)), strict=True))
        now = time.perf_counter() - started
        if anonymous > peak.anonymous:
            peak.anonymous, peak.seconds = anonymous, now
        peak.resident = max(peak.resident, resident)
        if not peak.samples or now - peak.samples[-1][0] >= 1.0:
            peak.samples.append((round(now, 1), anonymous))
        time.sleep(SAMPLE_S)
    peak.wall_s = time.perf_counter() - started
    return peak


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = [Path(f"/proc/{pid}/task/{task.name}/children") for task in Path(f"/proc/{pid}/task").iterdir()]
        found = [int(child) for path in children for child in path.read_text().split()]
    except OSError:  # it has just ended
        return
    for child in found:
        yield from _tree(child)


def _memory(pid: int) -> tuple[int, int]:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return tuple(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))  # type: ignore[return-value]


def run(text: Path, tokenizer: Sequence[str], folder: Path) -> Peak:
    """`python -m trainers` from a text never seen before to a few steps of a tiny model."""
    config = override(
        PRESETS["fundamentallm/tiny"](),
        [
            *(*QUIET, "evaluation.every_steps=null", "budget.steps=40"),
            *(*tokenizer, f'data.sources=[{{"corpus": "{text}"}}]'),
        ],
    )
    path = folder / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "trainers", str(path), "--run-dir", str(folder / "run")]
    log = folder / "log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, text=True) as process:
        peak = watch(process)
    assert process.returncode == 0, log.read_text()
    return peak


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--megabytes", type=int, help="of the large text (default 2000)")
    parser.add_argument("--directory", type=Path, help="on a disk with room for three times the text")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, action="append")
    options = parser.parse_args(arguments)
    large = (options.megabytes or (40 if options.quick else 2000)) * 1_000_000
    sizes = {"small": SIZES["small"], "large": large}

    peaks: dict[str, dict[str, Peak]] = {}
    for kind in options.tokenizer or TOKENIZERS:
        peaks[kind] = {}
        for label, size in sizes.items():
            with scratch(options.directory) as folder:
                text = folder / "text.txt"
                write_text(text, size)
                peaks[kind][label] = run(text, TOKENIZERS[kind], folder)
                print(f"{kind}, {size / 1e6:.0f} MB: {peaks[kind][label].wall_s:.0f} s", flush=True)
    figures = []
    for kind, found in peaks.items():
        extra = (found["large"].anonymous - found["small"].anonymous) / 1e6
        of = f"{large / 1e9:g} GB" if large >= 1e9 else f"{large / 1e6:g} MB"
        figures += [
            Figure(f"{kind}, {of}: anonymous memory above a 2 MB text's", extra, "MB", bar=BAR_MB),
            Figure(f"{kind}, {of}: peak anonymous memory", found["large"].anonymous / 1e6, "MB"),
            Figure(f"{kind}, 2 MB: peak anonymous memory", found["small"].anonymous / 1e6, "MB"),
            Figure(f"{kind}, {of}: the whole run", found["large"].wall_s, "s"),
        ]
    report("packing_memory", figures, quick=options.quick or options.megabytes is not None, samples=peaks)


if __name__ == "__main__":
    main()
