"""Text samples beside what really follows, written at evaluations."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from trainers.config import RunConfig, SampleConfig
from trainers.data.types import Tokenizer
from trainers.generate import GenerateConfig, generate

if TYPE_CHECKING:
    from trainers.data.packed import PackedTokens


def write_samples(
    config: RunConfig, model: nn.Module, tokenizer: Tokenizer, validation: PackedTokens, run_dir: Path, step: int
) -> None:
    """samples/step-00000300.json: a list of {prompt, generated, truth}, the prompts spread over the validation text."""
    wanted = config.samples
    passages = _passages(wanted, tokenizer, validation)
    settings = GenerateConfig(
        max_tokens=wanted.new_tokens, temperature=wanted.temperature, top_k=wanted.top_k, seed=config.seed
    )
    continuations = generate(model, tokenizer, [prompt for prompt, _ in passages], settings)
    samples = [
        {"prompt": prompt, "generated": text, "truth": truth}
        for (prompt, truth), text in zip(passages, continuations, strict=True)
    ]
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(samples, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _passages(wanted: SampleConfig, tokenizer: Tokenizer, validation: PackedTokens) -> list[tuple[str, str]]:
    """Prompts and their true continuations, from evenly spaced places of the validation text."""
    length = wanted.prompt_tokens + wanted.new_tokens
    spare = max(0, len(validation) - length)
    passages = []
    for index in range(wanted.count):
        start = spare * index // max(1, wanted.count)
        tokens = validation.tokens[start : start + length]
        passages.append((tokenizer.decode(tokens[: wanted.prompt_tokens]), tokenizer.decode(tokens[wanted.prompt_tokens :])))
    return passages
