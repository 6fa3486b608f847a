"""Text samples beside what really follows, written at evaluations."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from trainers.config import SampleConfig
from trainers.data.types import Tokenizer
from trainers.generate import GenerateConfig, generate

if TYPE_CHECKING:
    from trainers.data.packed import PackedTokens


def write_samples(
    wanted: SampleConfig, seed: int, model: nn.Module, tokenizer: Tokenizer, validation: PackedTokens, path: Path
) -> None:
    """A JSON list of {prompt, generated, truth} at `path`, the prompts spread over the validation text."""
    passages = _passages(wanted, tokenizer, validation)
    settings = GenerateConfig(
        max_tokens=wanted.new_tokens, temperature=wanted.temperature, top_k=wanted.top_k, seed=seed
    )
    continuations = generate(model, tokenizer, [prompt for prompt, _ in passages], settings)
    samples = [
        {"prompt": prompt, "generated": text, "truth": truth}
        for (prompt, truth), text in zip(passages, continuations, strict=True)
    ]
    path.parent.mkdir(exist_ok=True)
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
        prompt, truth = np.split(validation.tokens[start : start + length], [wanted.prompt_tokens])
        passages.append((tokenizer.decode(prompt), tokenizer.decode(truth)))
    return passages
