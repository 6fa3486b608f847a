"""The schema of RunConfig as dotted paths, and what a person probably meant by one that does not exist."""

from __future__ import annotations

import difflib
import types
import typing
from functools import cache
from typing import Any

from trainers.config import Frozen, RunConfig

# What other programs call our fields. guide.py translates whole files; these only make a message helpful.
ALIASES: dict[str, str] = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "optimizer": "optim.name",
    "wd": "optim.weight_decay",
    "grad_clip": "optim.clip_norm",
    "gradient_clip_norm": "optim.clip_norm",
    "max_grad_norm": "optim.clip_norm",
    "adam_epsilon": "optim.eps",
    "batch_size": "batch.sequences",
    "micro_batch_size": "batch.micro_sequences",
    "accumulation_steps": "batch.micro_sequences",
    "gradient_accumulation_steps": "batch.micro_sequences",
    "num_epochs": "budget.epochs",
    "max_epochs": "budget.epochs",
    "max_steps": "budget.steps",
    "num_steps": "budget.steps",
    "max_tokens": "budget.tokens",
    "hidden_size": "model.d_model",
    "n_embd": "model.d_model",
    "num_layers": "model.n_layers",
    "n_layer": "model.n_layers",
    "num_heads": "model.n_heads",
    "n_head": "model.n_heads",
    "ffn_dim": "model.d_ff",
    "block_size": "model.context_length",
    "max_seq_len": "model.context_length",
    "seq_len": "data.sequence_length",
    "pos_encoding": "model.positions",
    "rope": "model.positions",
    "gradient_checkpointing": "model.activation_checkpointing",
    "warmup": "schedule.warmup_steps",
    "scheduler": "schedule.kind",
    "lr_scheduler": "schedule.kind",
    "min_lr": "schedule.min_lr_ratio",
    "mixed_precision": "precision.compute",
    "use_mixed_precision": "precision.compute",
    "dtype": "precision.compute",
    "dataset": "data.sources.0.corpus",
    "corpus": "data.sources.0.corpus",
    "validation_split": "data.validation.fraction",
    "val_split": "data.validation.fraction",
    "num_workers": "workers",
    "world_size": "workers",
    "random_seed": "seed",
    "early_stopping_patience": "early_stopping.patience",
    "eval_steps": "evaluation.every_steps",
    "eval_interval": "evaluation.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_interval": "checkpoint.every_steps",
    "log_interval": "logging.every_steps",
    "log_every_n_steps": "logging.every_steps",
}


def section_of(annotation: Any) -> type[Frozen] | None:
    """The part of a configuration that a field of this type holds, `X | None` included; None for any other field."""
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, Frozen):
            return option
    return None


def element_types(annotation: Any) -> tuple[Any, ...] | None:
    """The types of a list field's elements, the last one repeating if it is `...`; None for any other field."""
    for option in _options(annotation):
        if typing.get_origin(option) is tuple:
            return typing.get_args(option)
    return None


def is_text(annotation: Any) -> bool:
    """True for fields that hold nothing but text (a choice of words included, one of numbers not)."""
    return all(option is str or option is type(None) or _is_words(option) for option in _options(annotation))


def _is_words(option: Any) -> bool:
    words = typing.get_origin(option) is typing.Literal
    return words and all(isinstance(each, str) for each in typing.get_args(option))


def allows_null(annotation: Any) -> bool:
    return type(None) in _options(annotation)


def leaf_paths() -> tuple[str, ...]:
    """Every dotted path of a value, `0` for an index and `NAME` for a phase; the run's own before the phases'."""
    return _leaves(RunConfig)


def did_you_mean(parent: str, section: type[Frozen], key: str) -> str:
    """The end of a sentence about an unknown key: what was meant, or which keys there are."""
    known = list(section.model_fields)
    meant = _alias(parent, known, key) or _sibling(parent, known, key) or _elsewhere(parent, key)
    if meant:
        return f"did you mean `{meant}`?"
    return f"known here: {', '.join(known)}."


def _alias(parent: str, known: list[str], key: str) -> str | None:
    target = ALIASES.get(key.lower())
    if target is None:
        return None
    leaf = target.rsplit(".", 1)[-1]
    return _join(parent, leaf) if parent and leaf in known else target


def _sibling(parent: str, known: list[str], key: str) -> str | None:
    close = difflib.get_close_matches(key.lower(), known, n=1)
    return _join(parent, close[0]) if close else None


def _elsewhere(parent: str, key: str) -> str | None:
    for path in leaf_paths():
        if path.rsplit(".", 1)[-1] == key and not path.startswith("phases."):
            return path
    close = difflib.get_close_matches(_join(parent, key), leaf_paths(), n=1, cutoff=0.75)
    return close[0] if close else None


def _join(parent: str, key: str) -> str:
    return f"{parent}.{key}" if parent else key


@cache
def _leaves(section: type[Frozen]) -> tuple[str, ...]:
    paths: list[str] = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        elements = element_types(field.annotation)
        if inner is None and elements is not None and (inner := section_of(elements[0])) is not None:
            name += ".NAME" if name == "phases" else ".0"
        paths += [f"{name}.{leaf}" for leaf in _leaves(inner)] if inner else [name]
    return tuple(paths)


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself, without their Annotated wrapping."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(option for member in typing.get_args(annotation) for option in _options(member))
    return (annotation,)
