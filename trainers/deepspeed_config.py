"""DeepSpeed's configuration as a function of the run's, and a user's ds_config.json merged into it under rules.

The run says what is trained; a ds_config.json may tune how. What it says about things the run decides must agree.
Imports no torch and no deepspeed, so that a contradiction is found before anything starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainers.config import RunConfig
from trainers.config_training import OptimConfig
from trainers.errors import ConfigError

BUCKET = 50_000_000
"""values that are sent at a time; DeepSpeed's own 500 million would set 2 GB aside on each worker"""
LARGEST_FILE = 1 << 20  # bytes of a ds_config.json

# What a ds_config.json may set: it changes speed and memory, not what is trained.
TUNABLE = frozenset(
    {
        *("zero_optimization." + name for name in (
            *("reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "contiguous_gradients", "reduce_scatter"),
            *("use_multi_rank_bucket_allreduce", "allgather_partitions", "sub_group_size", "round_robin_gradients"),
            *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"),
            *("stage3_max_reuse_distance", "stage3_model_persistence_threshold", "prefetch_bucket_size"),
            *("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "memory_efficient_linear"),
            *("stage3_module_granularity_threshold", "log_trace_cache_warnings", "enable_sanity_checks"),
            "stage3_gather_16bit_weights_on_model_save",
        )),
        *(f"zero_optimization.offload_{what}.{name}" for what in ("optimizer", "param") for name in (
            "pin_memory", "buffer_count", "buffer_size", "max_in_cpu", "fast_init", "pipeline_read", "pipeline_write",
        )),
        *("wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "comms_logger"),
    }
)  # fmt: skip
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


def ds_config(config: RunConfig, optim: OptimConfig) -> dict[str, Any]:
    """What DeepSpeed is told: the run's settings, and what its ds_config.json tunes. ConfigError as merged."""
    own = run_settings(config, optim)
    path = config.deepspeed.config
    return own if path is None else merged(own, read_ds_config(Path(path)), config, path)


def run_settings(config: RunConfig, optim: OptimConfig) -> dict[str, Any]:
    """What the run itself says, with no file.

    Stage 0 shares nothing out: DeepSpeed computes in fp32 weights, and the engine's autocast and loss scale do what
    they do under engine=torch. From stage 1 on compute=bf16 and fp16 are DeepSpeed's: weights of that type beside
    master weights in fp32, of which each worker has its part.
    """
    stage = config.deepspeed.zero_stage
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_sequences,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": (optim.clip_norm or 0.0) if stage else 0.0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "reduce_scatter": True,
            # one all-reduce for all owners sends twice what a reduction to each owner does
            "use_multi_rank_bucket_allreduce": False,
            # DeepSpeed's own are made for models beyond 1e9 weights and would keep all of ours once they are gathered;
            # the last two are what Hugging Face's integration takes for "auto"
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": int(0.9 * config.model.d_model**2),
            "stage3_param_persistence_threshold": 10 * config.model.d_model,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if config.deepspeed.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if config.deepspeed.offload_parameters:
        settings["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if stage and config.precision.compute == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if stage and config.precision.compute == "fp16":
        settings["fp16"] = {  # as trainers.precision.LossScaler
            "enabled": True,
            "auto_cast": False,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": 16,
            "loss_scale_window": 2000,
            "hysteresis": 1,
            "min_loss_scale": 1,
        }
    return settings


# ---- a user's file --------------------------------------------------------------------------------------


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


def merged(own: Mapping[str, Any], user: Mapping[str, Any], config: RunConfig, source: str) -> dict[str, Any]:
    """`own` with what `user` tunes. ConfigError, a line a key, for what contradicts the run or is not known to be safe.

    A value "auto", as Hugging Face's files have it, is the run's own; `enabled: false` switches nothing on.
    """
    decided = _decided_values(own, config)
    problems: list[str] = []
    result = json.loads(json.dumps(own))
    for path, value in _leaves(user):
        if value == "auto" or _says_nothing(path, value, config):
            continue
        if path in TUNABLE:
            _put(result, path, value)
        elif path in DECIDED:
            if not _agree(value, decided.get(path)):
                wanted = _shown(decided.get(path))
                problems.append(f"{path} is {_shown(value)} there, and {wanted} by {DECIDED[path]} here")
        else:
            problems.append(f"{path}: {_why_not(path)}")
    if problems:
        raise ConfigError(
            f"deepspeed.config={source} contradicts the run:\n  "
            + "\n  ".join(problems)
            + '\nChange the run\'s setting, or write "auto" in the file, or leave the key out.'
        )
    return result


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
        if isinstance(value, Mapping) and here not in TUNABLE:
            yield from _leaves(value, here)
        else:
            yield here, value


def _says_nothing(path: str, value: Any, config: RunConfig) -> bool:
    """Parts that are switched off, and how the loss would be scaled in a precision that the run does not compute in."""
    if path.endswith(".enabled") and path not in DECIDED:
        return value is False
    if path.startswith("fp16.") and path != "fp16.enabled":
        return config.precision.compute != "fp16"
    return path.endswith(".device") and value in (None, "none")


def _agree(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower()
    return bool(theirs == ours)


def _why_not(path: str) -> str:
    for start, way_out in ELSEWHERE.items():
        if path == start or path.startswith(f"{start}."):
            return way_out
    return "not known to leave the training as the run describes it"


def _put(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, key = path.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
    data[key] = value


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


# ---- what this machine lacks ------------------------------------------------------------------------------


def check_deepspeed(config: RunConfig, device: str) -> None:
    """Refuse what `device` ("cpu", "cuda" or "mps") of this machine cannot do under engine=deepspeed: ConfigError.

    Reads the ds_config.json too. Imports neither torch nor deepspeed.
    """
    if config.engine != "deepspeed":
        return
    ds_config(config, config.resolved_phases()[0].optim)
    if device == "mps":
        raise ConfigError("engine=deepspeed is not supported on MPS: set device=cpu, or engine=torch.")
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "engine=deepspeed needs the package deepspeed, which is not installed: pip install 'deepspeed>=0.19', or "
            "set engine=torch (parallel=fsdp shares the weights out as ZeRO-3 does)."
        )
