"""codelm: the bash code model's dense decoder and its language stage."""

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

VOCABULARY = 32_000
ROW = 1_024  # tokens a training row, of the 4,096 that the model can see


def tiny() -> RunConfig:
    """113 M parameters, 12 layers of 768: codelm's language stage, 3 x 500 steps.

    `model.norm=rmsnorm` and `model.positions=rope` are its two architecture switches; `schedule.kind=cosine`
    instead of the constant rate of the guide.
    """
    return _language_stage("tiny", _decoder(12, 768, 12), batch=4, steps=500, lr=6e-5, warmup_steps=100)


def medium() -> RunConfig:
    """339 M parameters, 24 layers of 1,024: codelm's language stage, 3 x 1,000 steps."""
    return _language_stage("medium", _decoder(24, 1_024, 16), batch=2, steps=1_000, lr=5e-5, warmup_steps=200)


def large() -> RunConfig:
    """1.04 B parameters, 32 layers of 1,600: codelm's language stage, 3 x 1,000 steps."""
    return _language_stage("large", _decoder(32, 1_600, 25), batch=4, steps=1_000, lr=3e-5, warmup_steps=300)


def xlarge() -> RunConfig:
    """1.45 B parameters, 36 layers of 1,792: codelm's language stage, 3 x 1,000 steps."""
    return _language_stage("xlarge", _decoder(36, 1_792, 28), batch=2, steps=1_000, lr=2e-5, warmup_steps=400)


def _decoder(n_layers: int, d_model: int, n_heads: int) -> ModelConfig:
    return ModelConfig(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        context_length=4_096,
        vocab_size=VOCABULARY,
        norm="layernorm",
        positions="learned",
        activation="gelu",
        bias=True,
        tie_embeddings=True,
        dropout=0.1,
        init_std=0.02,
    )


def _language_stage(
    size: str, model: ModelConfig, *, batch: int, steps: int, lr: float, warmup_steps: int
) -> RunConfig:
    """Three rounds of `steps`, each scored on 20 batches, with byte-level BPE and a real held-out set.

    The original's whitespace tokenizer lost every newline and its 95/5 split was by order: both are mended here.
    """
    return RunConfig(
        preset=f"codelm/{size}",
        model=model,
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=VOCABULARY),
        data=DataConfig(sequence_length=ROW, validation=SplitConfig(method="hash", fraction=0.05)),
        batch=BatchConfig(sequences=batch),
        budget=BudgetConfig(steps=3 * steps),
        optim=OptimConfig(lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, decay="all", clip_norm=1.0),
        schedule=ScheduleConfig(kind="constant", warmup_steps=warmup_steps),
        evaluation=EvaluationConfig(every_steps=steps, every_epochs=None, max_tokens=20 * batch * ROW),
        checkpoint=CheckpointConfig(every_steps=steps, keep_last_n=1),
    )
