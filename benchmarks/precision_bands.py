"""Losses of bf16 and int8 beside fp32's, and what adapters over a 4-bit base make of unseen text, through Ray Train.

Every run is an `orchestrate train` of its own on a real text. The bands were fixed before the first run: bf16 within
1% of fp32 and int8 within 3%, means over the same seeds at equal tokens. A band narrower than the spread of fp32 over
its seeds is void. The adapters' text is by another hand than the base's, in the base's characters.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Figure, report
from benchmarks.workload import scratch

BANDS = {"bf16": 0.01, "int8": 0.03}
SEEDS = (1, 2, 3)
ADAPTER_STEPS_SHARE = 0.5
"""of the steps that the base took"""
UNSEEN_BYTES = 400_000
LORA = ("precision.weights=native", "precision.adapter_rank=16", "precision.compute=bf16")
"""the same adapters over the unquantised base"""


@dataclass
class Bench:
    """Runs in one folder; what each came to."""

    folder: Path
    steps: int
    losses: dict[str, list[float]] = field(default_factory=dict)
    """precision -> validation loss of each seed, in nats a character"""
    perplexity: dict[str, float] = field(default_factory=dict)
    """on the unseen text's held-out part"""

    def train(self, name: str, data: Path, *arguments: str, steps: int) -> float:
        """Validation loss at the end, in nats a character."""
        shown = [f"budget.steps={steps}", f"evaluation.every_steps={steps}", "samples.count=0"]
        self._orchestrate("train", "fundamentallm/small", "--name", name, "--data", str(data), *shown, *arguments)
        outcome = json.loads((self.folder / "runs" / name / "outcome.json").read_text(encoding="utf-8"))
        loss = float(outcome["metrics"]["val/loss"])
        print(f"  {name:20} {loss:.4f} nats a character", flush=True)
        return loss

    def evaluate(self, name: str, data: Path, *arguments: str) -> float:
        """Perplexity of a trained run on a text."""
        found = json.loads(self._orchestrate("evaluate", name, str(data), "--json", *arguments))
        return float(found["metrics"]["val/perplexity"])

    def bands(self, data: Path, precisions: Sequence[str], seeds: Sequence[int]) -> None:
        for seed in seeds:
            for precision in precisions:
                name = f"{precision}-{seed}"
                loss = self.train(name, data, "--precision", precision, "--seed", str(seed), steps=self.steps)
                self.losses.setdefault(precision, []).append(loss)

    def adapters(self, base: str, unseen: Path, held_out: Path) -> None:
        """The quantised base alone, and adapters over it and over the unquantised one, on text the base never saw."""
        steps = max(1, round(self.steps * ADAPTER_STEPS_SHARE))
        self.perplexity["unquantised base"] = self.evaluate(base, held_out)
        self.perplexity["4-bit base"] = self.evaluate(base, held_out, "--precision", "int4")
        for what, words in {
            "4-bit base + adapters": ("--precision", "int4"),
            "unquantised base + adapters": LORA,
        }.items():
            name = what.replace(" + ", "-").replace(" ", "-")
            self.train(name, unseen, "--init-from", base, *words, "optim.lr=1e-3", steps=steps)
            self.perplexity[what] = self.evaluate(name, held_out)

    def _orchestrate(self, verb: str, *arguments: str) -> str:
        command = [sys.executable, "-m", "orchestrator", verb, *arguments, "--runs-dir", str(self.folder / "runs")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


def in_the_alphabet(text: str, alphabet: set[str]) -> str:
    """`text` without the characters that a base of `alphabet` has no token for."""
    return "".join(character for character in text if character in alphabet)


def split(text: str, folder: Path) -> tuple[Path, Path]:
    """Files to adapt to and to score on: 9 parts and 1 of the text."""
    cut = len(text) * 9 // 10
    paths = folder / "unseen.txt", folder / "held_out.txt"
    for path, part in zip(paths, (text[:cut], text[cut:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return paths


def figures_of(bench: Bench) -> list[Figure]:
    fp32 = np.asarray(bench.losses["fp32"])
    spread = float(np.ptp(fp32) / fp32.mean())
    figures = [
        Figure("fp32: validation loss, mean of its seeds", float(fp32.mean()), "nats"),
        Figure("fp32: largest less smallest over its seeds, of the mean", spread, "x"),
    ]
    for precision, band in BANDS.items():
        losses = np.asarray(bench.losses[precision])
        apart = abs(float(losses.mean() / fp32.mean()) - 1)
        noise = f"the band is narrower than fp32's spread of {spread:.2%}" if band < spread else None
        figures += [
            Figure(f"{precision}: validation loss, mean of its seeds", float(losses.mean()), "nats"),
            Figure(f"{precision}: apart from fp32's mean", apart, "x", bar=band, noise=noise),
            Figure(
                f"{precision}: apart from fp32 of the same seed, at most", float(np.abs(losses / fp32 - 1).max()), "x"
            ),
        ]
    quantised = bench.perplexity["4-bit base"]
    for what, value in bench.perplexity.items():
        bar = quantised if what == "4-bit base + adapters" else None
        figures.append(Figure(f"unseen text: perplexity of the {what}", value, "", bar=bar))
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path, required=True, help="the text to train on")
    parser.add_argument("--unseen", type=Path, required=True, help="a text by another hand, for the adapters")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    steps, seeds = (4, SEEDS[:2]) if options.quick else (options.steps, SEEDS)

    with scratch() as folder:
        alphabet = set(options.data.read_text(encoding="utf-8"))
        unseen = in_the_alphabet(options.unseen.read_text(encoding="utf-8"), alphabet)[:UNSEEN_BYTES]
        bench = Bench(folder, steps)
        bench.bands(options.data, ("fp32", *BANDS), seeds)
        bench.adapters(f"fp32-{seeds[0]}", *split(unseen, folder))
    figures = figures_of(bench)
    samples: dict[str, Any] = {"losses": bench.losses, "perplexity": bench.perplexity, "steps": steps}
    assert all(math.isfinite(figure.value) for figure in figures)
    report("precision_bands", figures, quick=options.quick, samples=samples)


if __name__ == "__main__":
    main()
