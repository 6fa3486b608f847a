"""FundamentaLLM: a small transformer over characters."""

from __future__ import annotations

from trainers.config import (
    BatchConfig,
    BudgetConfig,
    CheckpointConfig,
    DataConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    PhaseConfig,
    RunConfig,
    SampleConfig,
    ScheduleConfig,
    SourceConfig,
    SplitConfig,
    TokenizerConfig,
)


def tiny() -> RunConfig:
    """15 thousand parameters, 32 characters: tens of steps a second, for tests and first looks.

    The validation text is cut to 8,192 tokens so that an evaluation takes no longer than the steps between two.
    """
    return _characters(
        "tiny",
        _model(d_model=32, n_heads=2, n_layers=1, context_length=32),
        batch=8,
        budget=BudgetConfig(steps=60),
        lr=3e-3,
        warmup_steps=6,
    ).model_copy(
        update={
            "evaluation": EvaluationConfig(every_steps=20, every_epochs=None, max_tokens=8192),
            "checkpoint": CheckpointConfig(every_steps=20),
            "samples": SampleConfig(count=1, prompt_tokens=8, new_tokens=32),
        }
    )


def small() -> RunConfig:
    """0.4 M parameters, 64 characters, 2 epochs: learns Shakespeare's spelling in minutes on two cores."""
    return _characters("small", _small_model(), batch=8, budget=BudgetConfig(epochs=2), lr=1e-3)


def medium() -> RunConfig:
    """19 M parameters, 256 characters, up to 10 epochs with early stopping: for one GPU.

    The defaults of a guide-style YAML (guide.py) are these too.
    """
    return _characters(
        "medium",
        _model(d_model=512, n_heads=8, n_layers=6, context_length=256),
        batch=32,
        budget=BudgetConfig(epochs=10),
        lr=3e-4,
        patience=5,
    )


def large() -> RunConfig:
    """85 M parameters, 512 characters, up to 20 epochs with early stopping: for one large GPU."""
    return _characters(
        "large",
        _model(d_model=768, n_heads=12, n_layers=12, context_length=512),
        batch=64,
        budget=BudgetConfig(epochs=20),
        lr=1e-4,
        patience=5,
    )


def two_phase() -> RunConfig:
    """The small model on English prose first, then on source code, 800 steps each: a run of two phases.

    The weights go over, the optimizer starts anew, and each phase has its own budget and schedule.
    """
    prose, code = (DataConfig(sources=(SourceConfig(corpus=f"python-stdlib/{part}"),)) for part in ("prose", "code"))
    budget = BudgetConfig(steps=800)
    run = _characters("two-phase", _small_model(), batch=8, budget=budget, lr=1e-3)
    phases = (
        PhaseConfig(name="prose", data=prose, budget=budget, schedule=_cosine(100)),
        PhaseConfig(name="code", data=code, budget=budget, schedule=_cosine(50), optim=_optim(5e-4)),
    )
    evaluation = EvaluationConfig(every_steps=200, every_epochs=None, max_tokens=65536)
    return RunConfig.model_validate(
        run.model_copy(update={"budget": None, "evaluation": evaluation, "phases": phases}).model_dump()
    )


def _characters(
    name: str,
    model: ModelConfig,
    *,
    batch: int,
    budget: BudgetConfig,
    lr: float,
    warmup_steps: int = 100,
    patience: int = 0,
) -> RunConfig:
    """The recipe all sizes share, with warm-up in the cosine schedule as the guide wished."""
    return RunConfig(
        preset=f"fundamentallm/{name}",
        seed=42,
        model=model,
        tokenizer=TokenizerConfig(kind="characters"),
        data=DataConfig(validation=SplitConfig(method="tail", fraction=0.1)),
        batch=BatchConfig(sequences=batch),
        budget=budget,
        optim=_optim(lr),
        schedule=_cosine(warmup_steps),
        evaluation=EvaluationConfig(every_epochs=1),
        early_stopping=EarlyStoppingConfig(patience=patience),
        checkpoint=CheckpointConfig(keep_last_n=3, save_best=True),
    )


def _model(*, d_model: int, n_heads: int, n_layers: int, context_length: int, dropout: float = 0.1) -> ModelConfig:
    return ModelConfig(
        d_model=d_model,
        n_heads=n_heads,
        n_layers=n_layers,
        context_length=context_length,
        norm="rmsnorm",
        positions="learned",
        activation="gelu",
        bias=True,
        tie_embeddings=True,
        dropout=dropout,
        dropout_positions=True,
        init_std=0.02,
    )


def _small_model() -> ModelConfig:
    # No dropout: two passes cannot overfit 0.4 M parameters, and 0.1 costs 0.12 nats on Shakespeare (1.875 for 1.758).
    return _model(d_model=128, n_heads=4, n_layers=2, context_length=64, dropout=0.0)


def _optim(lr: float) -> OptimConfig:
    # alpha 0.99 is for optim.name=rmsprop
    return OptimConfig(name="adamw", lr=lr, weight_decay=0.01, decay="linear", clip_norm=1.0, momentum=0.9, alpha=0.99)


def _cosine(warmup_steps: int) -> ScheduleConfig:
    return ScheduleConfig(kind="cosine", warmup_steps=warmup_steps, min_lr_ratio=0.1)
