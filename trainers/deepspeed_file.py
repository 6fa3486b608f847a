"""A user's ds_config.json: what it may tune of a run, by key and type, and what it must agree with.

Imports no torch and no deepspeed, so that a contradiction is found before anything starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from trainers.config import RunConfig
from trainers.errors import ConfigError

LARGEST_FILE = 1 << 20  # bytes

Takes = int | Literal["switch", "names"]
"""what a key may be set to: a whole number of at least so much, true or false, or a list of texts"""

ZERO = "zero_optimization"
_SIZES = (
    *("allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size", "prefetch_bucket_size"),
    *("stage3_param_persistence_threshold", "param_persistence_threshold", "stage3_model_persistence_threshold"),
    *("stage3_max_live_parameters", "max_live_parameters", "stage3_max_reuse_distance", "max_reuse_distance"),
    "stage3_module_granularity_threshold",
)
_SWITCHES = (
    *("overlap_comm", "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce"),
    *("allgather_partitions", "round_robin_gradients", "memory_efficient_linear", "log_trace_cache_warnings"),
    *("enable_sanity_checks", "stage3_gather_16bit_weights_on_model_save"),
)
_OFFLOADING: dict[str, dict[str, Takes]] = {
    "offload_optimizer": {
        "pin_memory": "switch", "buffer_count": 0, "fast_init": "switch",
        "pipeline_read": "switch", "pipeline_write": "switch",
    },
    "offload_param": {"pin_memory": "switch", "buffer_count": 0, "buffer_size": 0, "max_in_cpu": 0},
}  # fmt: skip
TOLD: dict[str, Takes] = {
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), "switch"),
    "steps_per_print": 1,
    **dict.fromkeys((f"comms_logger.{name}" for name in ("enabled", "prof_all", "verbose", "debug")), "switch"),
    "comms_logger.prof_ops": "names",
}
"""changes what DeepSpeed says"""
TUNABLE: dict[str, Takes] = {
    f"{ZERO}.reduce_bucket_size": 1,
    **dict.fromkeys((f"{ZERO}.{name}" for name in _SIZES), 0),
    **dict.fromkeys((f"{ZERO}.{name}" for name in _SWITCHES), "switch"),
    **{f"{ZERO}.{what}.{name}": takes for what, keys in _OFFLOADING.items() for name, takes in keys.items()},
    **TOLD,
}
"""changes speed, memory and the order of sums, not what is trained"""
# What the run decides -> the setting that decides it.
DECIDED = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.micro_sequences",
    "gradient_accumulation_steps": "batch.sequences and batch.micro_sequences",
    "gradient_clipping": "optim.clip_norm",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "deepspeed.offload_parameters",
    "bf16.enabled": "precision.compute",
    "fp16.enabled": "precision.compute",
    "fp16.auto_cast": "precision.compute",
    "fp16.loss_scale": "precision.compute",
    "fp16.initial_scale_power": "precision.compute",
    "fp16.loss_scale_window": "precision.compute",
    "fp16.hysteresis": "precision.compute",
    "fp16.min_loss_scale": "precision.compute",
    "optimizer.type": "optim.name",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "optimizer.params.momentum": "optim.momentum",
    "zero_allow_untested_optimizer": "optim.name",
    "zero_force_ds_cpu_optimizer": "optim.name",
}
# What is done elsewhere -> where.
ELSEWHERE = {
    "scheduler": "the schedule is the run's: set schedule.kind, schedule.warmup_steps and so on",
    "optimizer.params": "the optimizer is the run's: set it under optim",
    "activation_checkpointing": "set model.activation_checkpointing",
    "checkpoint": "checkpoints are the run's own files: set them under checkpoint",
    "data_types": "set precision.compute",
    "communication_data_type": "set precision.compute",
    "torch_autocast": "set precision.compute",
    "amp": "set precision.compute",
    "tensorboard": "metrics go to MLflow",
    "wandb": "metrics go to MLflow",
    "comet": "metrics go to MLflow",
    "csv_monitor": "metrics go to metrics.jsonl and MLflow",
}


def read_ds_config(path: Path) -> dict[str, Any]:
    """The JSON object at `path`. ConfigError where there is none."""
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(LARGEST_FILE + 1)[:LARGEST_FILE])
    except OSError as error:
        raise ConfigError(f"deepspeed.config={path}: cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"deepspeed.config={path}: not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"deepspeed.config={path}: must be a JSON object, got {type(data).__name__}.")
    return data


def tunings(own: Mapping[str, Any], user: Mapping[str, Any], config: RunConfig, source: str) -> dict[str, Any]:
    """What `user` (read from `source`) sets beside `own`, what the run itself says: dotted path -> value.

    A value "auto", as Hugging Face's files have it, or null is the run's own; `enabled: false` switches nothing on.
    ConfigError, a line a key, for what contradicts the run, is of another type or is not known to be safe.
    """
    decided = _decided_values(own, config)
    found: dict[str, Any] = {}
    problems: list[str] = []
    for path, value in _leaves(user):
        if value == "auto" or _says_nothing(path, value, config):
            continue
        if path in TUNABLE:
            if _is_what_it_takes(value, TUNABLE[path]):
                found[path] = int(value) if isinstance(value, float) else value
            else:
                problems.append(f"{path} is {_shown(value)} there, and must be {_said(TUNABLE[path])}")
        elif path in DECIDED:
            if not _agree(value, decided.get(path)):
                wanted = _shown(decided.get(path))
                problems.append(f"{path} is {_shown(value)} there, and {wanted} by {DECIDED[path]} here")
        else:
            problems.append(f"{path}: {_why_not(path)}")
    if problems:
        raise ConfigError(
            f"deepspeed.config={source} does not go with the run:\n  "
            + "\n  ".join(problems)
            + '\nChange the run\'s setting, or write "auto" in the file, or leave the key out.'
        )
    return found


def _decided_values(own: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """By path in a ds_config: what the run says, whether or not it is written into ours."""
    optim = config.resolved_phases()[0].optim
    compute = config.precision.compute
    return {
        **dict(_leaves(own)),
        "train_batch_size": config.sequences_per_step,
        "gradient_clipping": optim.clip_norm or 0.0,
        "bf16.enabled": compute == "bf16",
        "fp16.enabled": compute == "fp16",
        "optimizer.type": optim.name,
        "optimizer.params.lr": optim.lr,
        "optimizer.params.betas": list(optim.betas),
        "optimizer.params.eps": optim.eps,
        "optimizer.params.weight_decay": optim.weight_decay,
        "optimizer.params.momentum": optim.momentum,
    }


def _leaves(data: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, here)
        else:
            yield here, value


def _says_nothing(path: str, value: Any, config: RunConfig) -> bool:
    """What is left to the run: keys that are not set, parts that are switched off, and how the loss would be scaled in
    a precision that the run does not compute in."""
    if value is None and path in TUNABLE:
        return True
    if path.endswith(".enabled") and path not in DECIDED:
        return value is False
    if path.startswith("fp16.") and path != "fp16.enabled":
        return config.precision.compute != "fp16"
    for part, offloads in (
        ("offload_optimizer", config.deepspeed.offload_optimizer),
        ("offload_param", config.deepspeed.offload_parameters),
    ):
        if path in (f"{ZERO}.{part}", f"{ZERO}.{part}.device") and value in (None, "none"):
            return not offloads
    return False


def _is_what_it_takes(value: Any, takes: Takes) -> bool:
    if takes == "switch":
        return isinstance(value, bool)
    if takes == "names":
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return float(value).is_integer() and value >= takes  # 5e8, as these files often have it, is a whole number


def _said(takes: Takes) -> str:
    if isinstance(takes, int):
        return f"a whole number, {takes} or more"
    return "true or false" if takes == "switch" else "a list of texts"


def _agree(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower()
    return bool(theirs == ours)


def _why_not(path: str) -> str:
    for start, way_out in ELSEWHERE.items():
        if path == start or path.startswith(f"{start}."):
            return way_out
    return "not known to leave the training as the run describes it"


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)
