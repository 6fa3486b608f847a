"""genesis: deep and narrow Llama-style decoders, as plain language models."""

from __future__ import annotations

from trainers.config import (
    BatchConfig,
    BudgetConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    SplitConfig,
    TokenizerConfig,
)

VOCABULARY = 8_192
ROW = 512


def microscope() -> RunConfig:
    """185 M parameters, 77 layers of 384, pre-norm RMSNorm: the genesis backbone under the microscope.

    The original asks for `layernorm` here and runs RMSNorm; this is what runs.
    """
    return _backbone("microscope", _decoder(77, 384, 6))


def deep_narrow_40() -> RunConfig:
    """384 M parameters, 40 layers of 768 with DeepNorm."""
    return _backbone("deep_narrow_40", _deepnorm(_decoder(40, 768, 12)))


def deep_narrow_48() -> RunConfig:
    """624 M parameters, 48 layers of 896 with DeepNorm."""
    return _backbone("deep_narrow_48", _deepnorm(_decoder(48, 896, 14)))


def _decoder(n_layers: int, d_model: int, n_heads: int) -> ModelConfig:
    return ModelConfig(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        context_length=1_024,
        vocab_size=VOCABULARY,
        norm="rmsnorm",
        final_norm="rmsnorm",
        positions="rope_interleaved",
        rope_base=10_000.0,
        activation="swiglu",
        bias=False,
        tie_embeddings=True,
        dropout=0.0,
        init_std=0.02,
    )


def _deepnorm(model: ModelConfig) -> ModelConfig:
    """Post-norm blocks with alpha = (2N)^(1/4) and beta = (8N)^(-1/4), Wang et al. 2022 (arXiv:2203.00555)."""
    return ModelConfig.model_validate(model.model_dump() | {"norm": "deepnorm", "norm_position": "post"})


def _backbone(mode: str, model: ModelConfig) -> RunConfig:
    """Batches of 4 x 4 rows at a constant rate with strong weight decay, on a real held-out set."""
    return RunConfig(
        preset=f"genesis/{mode}",
        seed=42,
        model=model,
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=VOCABULARY, min_frequency=2),
        data=DataConfig(sequence_length=ROW, validation=SplitConfig(method="hash", fraction=0.025)),
        batch=BatchConfig(sequences=16, micro_sequences=4),
        budget=BudgetConfig(steps=50_000),
        optim=OptimConfig(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.08, decay="all", clip_norm=1.0),
        schedule=ScheduleConfig(kind="constant"),
        evaluation=EvaluationConfig(every_steps=100, every_epochs=None, max_tokens=10 * 4 * ROW),
        checkpoint=CheckpointConfig(every_steps=500, keep_last_n=3),
    )
