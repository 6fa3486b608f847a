"""The words of FundamentaLLM's guide and of its code, side by side with ours: tables alone."""

from __future__ import annotations

from typing import Literal, NamedTuple

# our word for each of their keys; several of theirs may mean one thing
MODEL_KEYS: dict[str, str] = {
    "d_model": "d_model",
    "model_dim": "d_model",
    "num_heads": "heads",
    "num_layers": "layers",
    "dropout": "dropout",
    "d_ff": "d_ff",
    "ffn_expansion": "ffn_expansion",
    "sequence_length": "context",
    "max_seq_len": "context",
    "pos_encoding": "positions",
    "vocab_size": "vocab_size",
    "gradient_checkpointing": "gradient_checkpointing",
}
TRAINING_KEYS: dict[str, str] = {
    "learning_rate": "lr",
    "batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "accumulation_steps": "accumulation",
    "gradient_clip_norm": "clip",
    "max_grad_norm": "clip",
    "gradient_clip": "clip",
    "sequence_length": "row",
    "epochs": "epochs",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "max_steps": "max_steps",
    "scheduler": "scheduler",
    "lr_scheduler": "scheduler",
    "warmup_steps": "warmup_steps",
    "min_lr_ratio": "min_lr_ratio",
    "step_size": "step_size",
    "gamma": "gamma",
    "optimizer": "optimizer",
    "weight_decay": "weight_decay",
    "optimizer_weight_decay": "weight_decay",
    "adam_epsilon": "eps",
    "optimizer_eps": "eps",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "optimizer_betas": "betas",
    "momentum": "momentum",
    "label_smoothing": "label_smoothing",
    "validation_split": "validation_split",
    "val_split": "validation_split",
    "train_split": "train_split",
    "use_mixed_precision": "mixed_precision",
    "mixed_precision": "mixed_precision",
    "early_stopping_patience": "patience",
    "early_stopping_metric": "metric",
    "early_stopping_mode": "mode",
    "early_stopping_min_delta": "min_delta",
    "save_every_n_epochs": "save_epochs",
    "save_every_n_steps": "save_steps",
    "keep_last_n": "keep_last_n",
    "keep_last_n_checkpoints": "keep_last_n",
    "checkpoint_keep_last": "keep_last_n",
    "save_best": "save_best",
    "eval_steps": "eval_steps",
    "eval_every_n_epochs": "eval_epochs",
    "log_every_n_steps": "log_steps",
    "seed": "seed",
    "deterministic": "deterministic",
    "device": "device",
    "num_workers": "loading_workers",
}

# our path where the value goes over as it is
UNCHANGED_MODEL = {
    "d_model": "model.d_model",
    "heads": "model.n_heads",
    "layers": "model.n_layers",
    "dropout": "model.dropout",
    "d_ff": "model.d_ff",
    "positions": "model.positions",
    "context": "model.context_length",
    "vocab_size": "model.vocab_size",
    "gradient_checkpointing": "model.activation_checkpointing",
}
UNCHANGED_TRAINING = {
    "lr": "optim.lr",
    "optimizer": "optim.name",
    "weight_decay": "optim.weight_decay",
    "eps": "optim.eps",
    "momentum": "optim.momentum",
    "label_smoothing": "optim.label_smoothing",
    "warmup_steps": "schedule.warmup_steps",
    "min_lr_ratio": "schedule.min_lr_ratio",
    "step_size": "schedule.step_size",
    "gamma": "schedule.gamma",
    "epochs": "budget.epochs",
    "validation_split": "data.validation.fraction",
    "patience": "early_stopping.patience",
    "mode": "early_stopping.mode",
    "min_delta": "early_stopping.min_delta",
    "save_epochs": "checkpoint.every_epochs",
    "keep_last_n": "checkpoint.keep_last_n",
    "save_best": "checkpoint.save_best",
    "eval_epochs": "evaluation.every_epochs",
    "seed": "seed",
    "deterministic": "deterministic",
    "device": "device",
}


class Shape(NamedTuple):
    """What one of their schedules is in ours; what a file says itself goes before these."""

    kind: Literal["constant", "linear", "cosine", "step"]
    min_lr_ratio: float
    step_size: float = 3.0
    step_unit: Literal["steps", "epochs"] = "epochs"
    gamma: float = 0.5


SCHEDULERS: dict[str, Shape] = {
    "constant": Shape("constant", 0.1),
    "none": Shape("constant", 0.1),
    "linear_warmup": Shape("constant", 0.1),
    "linear": Shape("linear", 0.01),
    "cosine": Shape("cosine", 0.1),
    "step": Shape("step", 0.0),
    "exponential": Shape("step", 0.1, step_size=1.0, step_unit="steps", gamma=0.99),
}
