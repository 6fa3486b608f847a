"""Guide-style YAML (`model:` and `training:`, or flat training keys) as our own configuration.

The one place that knows what FundamentaLLM's guide and its code called things; RunConfig has one
name per thing. What is left out comes from the preset fundamentallm/medium, which is that guide's default.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from trainers.config import ModelConfig, RunConfig
from trainers.errors import ConfigError
from trainers.guide_words import MODEL_KEYS, SCHEDULERS, TRAINING_KEYS, UNCHANGED_MODEL, UNCHANGED_TRAINING
from trainers.presets.fundamentallm import medium


def is_guide(data: Mapping[str, Any]) -> bool:
    """True for a file in the guide's words: a `training` key, or none of our sections and one of its own keys."""
    if "training" in data:
        return True
    model = data.get("model")
    model_keys = set(model) if isinstance(model, Mapping) else set()
    ours = set(RunConfig.model_fields)
    if set(data) & (ours - set(TRAINING_KEYS) - {"model"}):
        return False
    if model_keys & (set(MODEL_KEYS) - set(ModelConfig.model_fields)):
        return True
    return "model" not in data and bool(set(data) & (set(TRAINING_KEYS) - ours))


def translate(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our configuration for a guide-style file, ready for `build_config`, and what a person should know about it.

    ConfigError for an unknown key (with the nearest known one) and for two keys that say different things.
    """
    model, training = _sections(data)
    translation = _Translation(medium().model_dump(mode="json") | {"preset": "guide"})
    translation.model(model)
    translation.rows(model, training)
    translation.training(training)
    return translation.config, translation.notes


class _Translation:
    """Our configuration as plain data, filled in topic by topic, with the notes on what changed its meaning."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.notes: list[str] = []

    def put(self, path: str, value: Any) -> None:
        *parents, leaf = path.split(".")
        section = self.config
        for parent in parents:
            section = section[parent]
        section[leaf] = value

    def note(self, text: str) -> None:
        self.notes.append(text)

    def model(self, model: dict[str, Any]) -> None:
        for key, path in UNCHANGED_MODEL.items():
            if key in model:
                self.put(path, model[key])
        if "ffn_expansion" in model:
            width = _whole("model.ffn_expansion", model["ffn_expansion"]) * _whole(
                "model.d_model", self.config["model"]["d_model"]
            )
            if model.get("d_ff", width) != width:
                raise ConfigError(
                    f"model.d_ff ({model['d_ff']}) and ffn_expansion x d_model ({width}) differ: give one of them."
                )
            self.put("model.d_ff", width)
        if "vocab_size" in model:
            self.note(
                f"model.vocab_size ({model['vocab_size']}) is the size of the embedding table; the characters come "
                "from the text and must fit into it. Leave it out to have the table made to measure."
            )

    def rows(self, model: dict[str, Any], training: dict[str, Any]) -> None:
        """One length where the file gives one; the original trained on 256 whatever the model's was."""
        if "row" in training and "context" in model:
            self.put("data.sequence_length", training["row"])
        elif "row" in training:
            self.put("model.context_length", training["row"])

    def training(self, training: dict[str, Any]) -> None:
        for key, path in UNCHANGED_TRAINING.items():
            if key in training:
                self.put(path, training[key])
        accumulation = self.batch(training)
        self.schedule(training)
        self.budget(training, accumulation)
        self.optimizer(training)
        self.validation(training, accumulation)
        self.precision(training)
        for key, path in (("save_steps", "checkpoint.every_steps"), ("log_steps", "logging.every_steps")):
            if key in training:
                self.put(path, self.updates(f"training.{key}", training[key], accumulation))
        if "loading_workers" in training:
            self.note("training.num_workers is left out: rows are read by arithmetic, without loading processes.")

    def batch(self, training: dict[str, Any]) -> int:
        """Sets the batch and returns the micro-batches in one update."""
        rows = _whole("training.batch_size", training.get("batch_size", self.config["batch"]["sequences"]))
        accumulation = _whole("training.gradient_accumulation_steps", training.get("accumulation", 1))
        self.put("batch.sequences", rows * accumulation)
        if accumulation > 1:
            self.put("batch.micro_sequences", rows)
            self.note(
                f"batch_size {rows} x gradient_accumulation_steps {accumulation} is a step of {rows * accumulation} "
                f"sequences (batch.sequences) in micro-batches of {rows}."
            )
        return accumulation

    def updates(self, key: str, micro_batches: Any, accumulation: int) -> int:
        """Optimizer steps for a count that the guide gives in micro-batches."""
        count = _whole(key, micro_batches)
        steps = -(-count // accumulation)
        if accumulation > 1:
            self.note(f"{key}: {count} micro-batches are {steps} steps; a step here is one optimizer update.")
        return steps

    def schedule(self, training: dict[str, Any]) -> None:
        name = training.get("scheduler")
        if name is None:
            return
        shape = SCHEDULERS.get(name) if isinstance(name, str) else None
        if shape is None:
            raise ConfigError(
                f"training.scheduler: must be one of {', '.join(SCHEDULERS)}, got {name!r}."
                + _nearest(str(name), SCHEDULERS)
            )
        self.put("schedule.kind", shape.kind)
        self.put("schedule.step_unit", shape.step_unit)
        for field in ("min_lr_ratio", "step_size", "gamma"):
            if field not in training:
                self.put(f"schedule.{field}", getattr(shape, field))
        if name == "linear_warmup":
            self.note("scheduler linear_warmup is schedule.kind=constant, with a warm-up like every schedule here.")
        if name == "exponential":
            if "step_size" in training:
                raise ConfigError("training.step_size belongs to scheduler step; exponential falls at every update.")
            gamma = self.config["schedule"]["gamma"]
            self.note(f"scheduler exponential is schedule.kind=step with the factor {gamma} at every update.")

    def budget(self, training: dict[str, Any], accumulation: int) -> None:
        if "max_steps" not in training:
            return
        if "epochs" in training:
            self.note("max_steps is given, so the number of epochs is left out: a budget has one clock.")
        self.put("budget.epochs", None)
        self.put("budget.steps", self.updates("training.max_steps", training["max_steps"], accumulation))

    def optimizer(self, training: dict[str, Any]) -> None:
        if "betas" in training and ("beta1" in training or "beta2" in training):
            raise ConfigError("training.optimizer_betas and training.adam_beta1/2 say the same: give one of them.")
        first, second = self.config["optim"]["betas"]
        self.put("optim.betas", training.get("betas", [training.get("beta1", first), training.get("beta2", second)]))
        if "clip" in training:
            off = training["clip"] == 0
            self.put("optim.clip_norm", None if off else training["clip"])
            if off:
                self.note("gradient clipping 0 means no clipping (optim.clip_norm=null).")

    def validation(self, training: dict[str, Any], accumulation: int) -> None:
        if "train_split" in training:
            held_out = round(1.0 - _fraction("training.train_split", training["train_split"]), 12)
            given = training.get("validation_split", held_out)
            if not isinstance(given, (int, float)) or abs(given - held_out) > 1e-9:
                raise ConfigError(
                    f"training.train_split ({training['train_split']}) and validation_split ({given}) must sum to 1: "
                    "give one of them."
                )
            self.put("data.validation.fraction", held_out)
        if "metric" in training:
            self.put("early_stopping.metric", _metric(training["metric"]))
        if "eval_steps" in training:
            if "eval_epochs" in training:
                self.note("eval_every_n_epochs is given, so eval_steps is left out: early stopping counts epochs.")
                return
            self.put("evaluation.every_epochs", None)
            every = self.updates("training.eval_steps", training["eval_steps"], accumulation)
            self.put("evaluation.every_steps", every)
            if self.config["early_stopping"]["patience"]:
                self.note("early stopping counts evaluations, which eval_steps puts at steps instead of epochs.")

    def precision(self, training: dict[str, Any]) -> None:
        wanted = training.get("mixed_precision", False)
        if not isinstance(wanted, bool):
            raise ConfigError(f"training.use_mixed_precision: must be true or false, got {wanted!r}.")
        if wanted and training.get("device") == "cuda":
            self.put("precision.compute", "fp16")
        elif wanted:
            self.note(
                "use_mixed_precision means fp16 on a CUDA device; this file does not say device: cuda, so it trains "
                "in fp32. Say device: cuda, or precision.compute=bf16."
            )


def _sections(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's and the training's values by our words, from a file with both sections or with flat training keys."""
    if "training" in data:
        stray = [str(key) for key in data if key not in ("model", "training")]
        if stray:
            raise ConfigError(
                "\n".join(
                    f"{key}: unknown key; a guide-style file has `model` and `training`."
                    + _nearest(key, TRAINING_KEYS, "training.")
                    for key in stray
                )
            )
        training = data["training"]
    else:
        training = {key: value for key, value in data.items() if key != "model"}
    problems: list[str] = []
    model = _by_our_words("model", data.get("model"), MODEL_KEYS, problems)
    known = _by_our_words("training", training, TRAINING_KEYS, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return model, known


def _by_our_words(name: str, section: Any, words: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    """The section's values that are not null by our words; what is wrong with its keys goes to `problems`."""
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name}: must be a mapping of keys to values, got {section!r:.80}.")
    found: dict[str, tuple[str, Any]] = {}
    for key, value in section.items():
        word = words.get(key)
        if word is None:
            problems.append(f"{name}.{key}: unknown key. {_meant(name, str(key))}")
        elif value is not None:
            before, standing = found.setdefault(word, (key, value))
            if standing != value:
                problems.append(
                    f"{name}.{before} ({standing}) and {name}.{key} ({value}) mean the same thing and differ: give one."
                )
    return {word: value for word, (_, value) in found.items()}


def _meant(name: str, key: str) -> str:
    """A hint on an unknown key: the other section's, a near one, or which there are."""
    words = {"model": MODEL_KEYS, "training": TRAINING_KEYS}
    known = words.pop(name)
    ((other, elsewhere),) = words.items()
    if key in elsewhere:
        return f"Did you mean `{other}.{key}`?"
    return _nearest(key, known, f"{name}.").strip() or f"Known: {', '.join(known)}."


def _nearest(key: str, known: Mapping[str, Any], prefix: str = "") -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean `{prefix}{close[0]}`?" if close else ""


def _metric(name: Any) -> str:
    """`val_loss` as the name the record has for it, `val/loss`."""
    text = str(name)
    return text if "/" in text else text.replace("_", "/", 1)


def _whole(path: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{path}: must be a whole number of at least 1, got {value!r:.80}.")
    return value


def _fraction(path: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ConfigError(f"{path}: must be a fraction between 0 and 1, got {value!r:.80}.")
    return float(value)
