"""Guide-style YAML becomes the RunConfig it means, with notes where a word changed its meaning."""

from __future__ import annotations

from typing import Any

import pytest

from trainers.config import RunConfig
from trainers.config_io import build_config, differences, fingerprint_fields, load_yaml
from trainers.config_paths import leaf_paths
from trainers.errors import ConfigError
from trainers.guide import is_guide, translate
from trainers.guide_words import MODEL_KEYS, TRAINING_KEYS, UNCHANGED_MODEL, UNCHANGED_TRAINING
from trainers.presets.fundamentallm import medium

GUIDE = """
model:
  d_model: 256
  num_heads: 4
  num_layers: 4
  d_ff: 512
  dropout: 0.2
training:
  batch_size: 16
  learning_rate: 1e-3
  num_epochs: 5
  warmup_steps: 50
  scheduler: step
  step_size: 3
  gamma: 0.5
  gradient_clip_norm: 0.5
  validation_split: 0.2
  early_stopping_patience: 7
  use_mixed_precision: true
  save_every_n_epochs: 2
  keep_last_n: 4
  save_best: false
  seed: 7
  deterministic: true
"""


def translated(text: str) -> tuple[RunConfig, list[str]]:
    data = load_yaml(text)
    assert is_guide(data)
    ours, notes = translate(data)
    return build_config(ours), notes


def changed(text: str) -> list[str]:
    """What a file changes against the guide's default."""
    return differences(fingerprint_fields(medium(), ()), fingerprint_fields(translated(text)[0], ()))


def test_the_guides_own_example() -> None:
    config, notes = translated(GUIDE)
    assert (config.model.d_model, config.model.n_heads, config.model.n_layers) == (256, 4, 4)
    assert (config.model.d_ff, config.model.dropout) == (512, 0.2)
    assert (config.batch.sequences, config.optim.lr, config.optim.clip_norm) == (16, 1e-3, 0.5)
    assert config.budget is not None
    assert config.budget.epochs == 5
    schedule = config.schedule
    assert (schedule.kind, schedule.warmup_steps, schedule.step_size, schedule.step_unit) == ("step", 50, 3, "epochs")
    assert (schedule.gamma, schedule.min_lr_ratio) == (0.5, 0)
    assert (config.data.validation.fraction, config.early_stopping.patience) == (0.2, 7)
    assert (config.checkpoint.every_epochs, config.checkpoint.keep_last_n) == (2, 4)
    assert (config.checkpoint.save_best, config.seed, config.deterministic) == (False, 7, True)
    assert config.precision.compute == "fp32"
    assert len(notes) == 1
    assert "fp16" in notes[0]


def test_what_is_left_out_is_the_guides_default() -> None:
    config, notes = translated("training: {}")
    assert config == medium().model_copy(update={"preset": "guide"})
    assert notes == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("model: {ffn_expansion: 2, num_layers: 1}", ["model.n_layers: 6 -> 1", "model.d_ff: (not set) -> 1024"]),
        ("model: {sequence_length: 64, pos_encoding: rope}",
         ["model.context_length: 256 -> 64", "model.positions: learned -> rope"]),
        ("training: {sequence_length: 64}", ["model.context_length: 256 -> 64"]),
        ("model: {sequence_length: 512}\ntraining: {sequence_length: 64}",
         ["model.context_length: 256 -> 512", "data.sequence_length: (not set) -> 64"]),
        ("max_grad_norm: 2", ["optim.clip_norm: 1.0 -> 2.0"]),
        ("gradient_clip_norm: 0", ["optim.clip_norm: 1.0 -> (not set)"]),
        ("train_split: 0.8", ["data.validation.fraction: 0.1 -> 0.2"]),
        ("scheduler: linear", ["schedule.kind: cosine -> linear", "schedule.min_lr_ratio: 0.1 -> 0.01"]),
        ("lr_scheduler: linear\nmin_lr_ratio: 0.5",
         ["schedule.kind: cosine -> linear", "schedule.min_lr_ratio: 0.1 -> 0.5"]),
        ("scheduler: linear_warmup", ["schedule.kind: cosine -> constant"]),
        ("scheduler: exponential", ["schedule.kind: cosine -> step", "schedule.step_size: 3.0 -> 1.0",
                                    "schedule.step_unit: epochs -> steps", "schedule.gamma: 0.5 -> 0.99"]),
        ("optimizer: adam\nadam_epsilon: 1e-6\nweight_decay: 0",
         ["optim.name: adamw -> adam", "optim.eps: 1e-08 -> 1e-06", "optim.weight_decay: 0.01 -> 0.0"]),
        ("adam_beta2: 0.95", ["optim.betas.1: 0.999 -> 0.95"]),
        ("max_epochs: 3", ["budget.epochs: 10.0 -> 3.0"]),
        ("max_steps: 300", ["budget.steps: (not set) -> 300", "budget.epochs: 10.0 -> (not set)"]),
        ("eval_every_n_epochs: 2", ["evaluation.every_epochs: 1.0 -> 2.0"]),
        ("eval_steps: 100", ["evaluation.every_steps: (not set) -> 100", "evaluation.every_epochs: 1.0 -> (not set)"]),
        ("early_stopping_metric: val_accuracy\nearly_stopping_mode: max\nearly_stopping_min_delta: 0.01",
         ["early_stopping.metric: val/loss -> val/accuracy", "early_stopping.mode: min -> max",
          "early_stopping.min_delta: 0.0 -> 0.01"]),
        ("training: {use_mixed_precision: true, device: cuda}",
         ["device: auto -> cuda", "precision.compute: fp32 -> fp16"]),
        ("training: {mixed_precision: true, device: cpu}", ["device: auto -> cpu"]),
        ("save_every_n_steps: 7\nlog_every_n_steps: 3\ncheckpoint_keep_last: 1", []),
        ("learning_rate: null\nbatch_size: 8", ["batch.sequences: 32 -> 8"]),
    ],
)  # fmt: skip
def test_a_key_changes_what_it_means_and_nothing_else(text: str, lines: list[str]) -> None:
    assert changed(text) == lines


def test_micro_batches_become_steps_and_it_is_said() -> None:
    config, notes = translated("batch_size: 8\ngradient_accumulation_steps: 4\nmax_steps: 402\neval_steps: 100")
    assert (config.batch.sequences, config.micro_sequences, config.accumulation) == (32, 8, 4)
    assert (config.budget and config.budget.steps, config.evaluation.every_steps) == (101, 25)
    assert sum("micro-batches are" in note for note in notes) == 2
    alone, quiet = translated("batch_size: 8\nmax_steps: 402")
    assert (alone.accumulation, alone.budget and alone.budget.steps, quiet) == (1, 402, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {learning_rat: 1}", "Did you mean `training.learning_rate`"),
        ("training: {d_model: 1}", "Did you mean `model.d_model`"),
        ("model: {batch_size: 1, num_heads: 2}", "Did you mean `training.batch_size`"),
        ("training: {zzz: 1}", "Known: learning_rate"),
        ("training: {}\nmodels: {}", "models: unknown key"),
        ("training: {epochs: 3, max_epochs: 4}", "mean the same thing and differ"),
        ("training: {train_split: 0.9, validation_split: 0.2}", "must sum to 1"),
        ("model: {ffn_expansion: 4, d_ff: 3}", "differ"),
        ("training: {scheduler: cosin}", "Did you mean `cosine`"),
        ("training: {scheduler: [1]}", "must be one of"),
        ("training: {batch_size: x}", "whole number"),
        ("training: {batch_size: true}", "whole number"),
        ("training: {use_mixed_precision: 3}", "true or false"),
        ("training: {train_split: 2}", "between 0 and 1"),
        ("training: [1]", "must be a mapping"),
        ("model: 3\ntraining: {}", "must be a mapping"),
        ("training: {learning_rate: -1}", r"optim\.lr"),
        ("training: {keep_last_n: 0}", r"checkpoint\.keep_last_n"),
    ],
)
def test_a_bad_guide_is_refused_with_a_way_out(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        translated(text)


@pytest.mark.parametrize(
    ("text", "guide"),
    [
        ("training: {}", True),
        ("model: {num_heads: 4}", True),
        ("model: {num_heads: 4}\nlearning_rate: 1", True),
        ("learning_rate: 1", True),
        ("learning_rate: 1\nseed: 3", True),
        ("seed: 3", False),
        ("model: {d_model: 64}", False),
        ("budget: {steps: 3}\nlearning_rate: 1", False),
        ("training_: {}", False),
    ],
)
def test_a_guide_is_recognised_by_its_words(text: str, guide: bool) -> None:
    assert is_guide(load_yaml(text)) is guide


def test_no_file_of_ours_is_taken_for_a_guide() -> None:
    assert not is_guide(medium().model_dump(mode="json"))


def test_the_tables_name_fields_that_exist() -> None:
    targets: dict[str, Any] = UNCHANGED_MODEL | UNCHANGED_TRAINING
    assert set(targets.values()) <= set(leaf_paths())
    assert set(UNCHANGED_MODEL) <= set(MODEL_KEYS.values())
    assert set(UNCHANGED_TRAINING) <= set(TRAINING_KEYS.values())
