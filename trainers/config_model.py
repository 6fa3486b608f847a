"""The model: its architecture, and what a phase may switch in it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainers.config_fields import Fraction, Frozen, PositiveFloat, PositiveInt


class ModelConfig(Frozen):
    """A decoder-only transformer; every dense architecture of the presets is a setting of these fields."""

    # The upper bounds lie far beyond any model; below them every count and byte fits into 64 bits.
    d_model: Annotated[int, Field(gt=0, le=10**6)] = 128
    n_layers: Annotated[int, Field(gt=0, le=1000)] = 2
    n_heads: PositiveInt = 4
    d_ff: Annotated[int, Field(gt=0, le=10**7)] | None = None  # feed-forward width; None means 4 x d_model
    context_length: Annotated[int, Field(gt=0, le=10**9)] = 64  # longest sequence the position scheme covers
    vocab_size: Annotated[int, Field(gt=0, le=10**8)] | None = None  # None: what the tokenizer has
    norm: Literal["layernorm", "rmsnorm", "deepnorm"] = "rmsnorm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: PositiveFloat | None = None  # None: 1e-6 for rmsnorm, 1e-5 for the others
    final_norm: Literal["same", "rmsnorm", "none"] = "same"  # the norm before the head
    positions: Literal["learned", "sinusoidal", "rope", "rope_interleaved"] = "learned"
    rope_base: PositiveFloat = 10_000.0
    activation: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True  # in attention and feed-forward projections; the output head never has one
    tie_embeddings: bool = True
    dropout: Fraction = 0.1
    dropout_positions: bool = False  # drop parts of the position vectors too, before they are added (fundamentallm)
    init_std: PositiveFloat = 0.02
    activation_checkpointing: bool = False

    @property
    def ffn_width(self) -> int:
        return self.d_ff or 4 * self.d_model

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        if self.d_model % self.n_heads:
            below = self.d_model // self.n_heads * self.n_heads
            way_out = f"d_model {below} or {below + self.n_heads}" if below else f"d_model {self.n_heads}"
            raise ValueError(
                f"model.d_model ({self.d_model}) must be a multiple of model.n_heads ({self.n_heads}). "
                f"Nearest: {way_out}."
            )
        if self.positions.startswith("rope") and (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"rotary positions need an even head width, but d_model / n_heads = {self.d_model // self.n_heads}."
            )
        if self.norm == "deepnorm" and self.norm_position != "post":
            raise ValueError("model.norm=deepnorm is a post-norm block: set model.norm_position=post.")
        return self


class ModelSwitches(Frozen):
    """What a phase may change in the model without changing its parameters."""

    dropout: Fraction | None = None
    activation_checkpointing: bool | None = None
