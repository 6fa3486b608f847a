"""Text samples of a run beside what the text really says: Markdown for each evaluation, a picture of the last."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from orchestrator.plots import plot_text

PROMPT, GENERATED, TRUTH = "#7b8794", "#1f5fae", "#2e7d4f"  # grey, blue, green
LAST_PNG = "last.png"


@dataclass(frozen=True)
class Sample:
    prompt: str
    generated: str
    truth: str


def render_samples(folder: Path) -> Path | None:
    """step-N.md beside each step-N.json that has none yet, and last.png of the newest; its path, None without samples.

    The .json files hold a list of {prompt, generated, truth}.
    """
    files = sorted(folder.glob("step-*.json"))
    for file in files:
        if not file.with_suffix(".md").exists() or file is files[-1]:
            step, samples = read_samples(file)
            _write(file.with_suffix(".md"), to_markdown(step, samples))
    if not files:
        return None
    draw_samples(*read_samples(files[-1]), folder / LAST_PNG)
    return folder / LAST_PNG


def read_samples(file: Path) -> tuple[int, list[Sample]]:
    """The step in the file's name, and the samples in it."""
    items = json.loads(file.read_text(encoding="utf-8"))
    return int(file.stem.removeprefix("step-")), [Sample(i["prompt"], i["generated"], i["truth"]) for i in items]


def to_markdown(step: int, samples: list[Sample]) -> str:
    """One section a sample: the prompt, what the model writes, what the text says."""
    parts = [f"# Samples at step {step:,}\n"]
    for number, sample in enumerate(samples, 1):
        parts.append(f"## Sample {number}\n")
        parts.append(f"The text begins:\n\n{_fenced(sample.prompt)}\n")
        parts.append(f"The model goes on:\n\n{_fenced(sample.generated)}\n")
        parts.append(f"The text goes on:\n\n{_fenced(sample.truth)}\n")
    return "\n".join(parts)


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def draw_samples(step: int, samples: list[Sample], target: Path) -> None:
    """A PNG with the prompt in grey, the model's text in blue and the true text in green."""
    blocks: list[list[tuple[str, str]]] = [
        [
            ("grey: the prompt   ", PROMPT),
            ("blue: what the model writes   ", GENERATED),
            ("green: what the text says", TRUTH),
        ]
    ]
    for sample in samples:
        blocks.append([(sample.prompt, PROMPT), (sample.generated, GENERATED)])
        blocks.append([(sample.prompt, PROMPT), (sample.truth, TRUTH)])
    plot_text(blocks, target, f"Samples at step {step:,}")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
