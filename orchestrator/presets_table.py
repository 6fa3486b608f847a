"""The presets as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from trainers.config import ModelConfig, RunConfig, TokenizerConfig
from trainers.presets import PRESETS, description


def preset_rows() -> list[dict[str, Any]]:
    """One dict a preset: name, description, and the sizes a person chooses by."""
    return [_row(name, make()) for name, make in PRESETS.items()]


def presets_table(rows: list[dict[str, Any]]) -> Table:
    """Names never folded; descriptions, which say the sizes, take what width remains."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for row in rows:
        table.add_row(row["name"], row["description"])
    return table


def _row(name: str, config: RunConfig) -> dict[str, Any]:
    model = config.model
    vocabulary = known_vocabulary(config)
    parameters = closed_form_parameters(model, vocabulary) if vocabulary else None
    return {
        "name": name,
        "description": description(name),
        "parameters": parameters,
        "d_model": model.d_model,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "context_length": model.context_length,
        "tokenizer": _tokenizer(config.tokenizer),
        "vocab_size": vocabulary,
        "phases": [phase.name for phase in config.phases],
    }


def _tokenizer(tokenizer: TokenizerConfig) -> str:
    return tokenizer.kind if tokenizer.vocab_size is None else f"{tokenizer.kind} {tokenizer.vocab_size:,}"


def known_vocabulary(config: RunConfig) -> int | None:
    """The vocabulary's size where the configuration fixes it; characters are known only with the text."""
    return config.model.vocab_size or config.tokenizer.vocab_size


def closed_form_parameters(model: ModelConfig, vocabulary: int) -> int:
    """Trainable parameters of the dense decoder, without torch; `trainers.models.parameter_count` counts the real one.

    Attention has four square projections; SwiGLU has three matrices where GELU has two; LayerNorm has a bias.
    """
    d, ff = model.d_model, model.ffn_width
    matrices = 3 if model.activation == "swiglu" else 2
    norm = d if model.norm == "rmsnorm" else 2 * d
    block = 4 * d * d + matrices * d * ff + 2 * norm
    if model.bias:
        block += 4 * d + (matrices - 1) * ff + d
    final = {"none": 0, "rmsnorm": d, "same": norm}[model.final_norm]
    positions = model.context_length * d if model.positions == "learned" else 0
    heads = 1 if model.tie_embeddings else 2
    return heads * vocabulary * d + positions + model.n_layers * block + final
