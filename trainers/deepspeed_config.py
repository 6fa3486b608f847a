"""DeepSpeed's configuration as a function of the run's, and a user's ds_config.json merged into it.

The run says what is trained; a ds_config.json may tune how (deepspeed_file.py). Imports no torch and no deepspeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainers.config import RunConfig
from trainers.config_training import OptimConfig
from trainers.deepspeed_file import TOLD, read_ds_config, tunings
from trainers.errors import ConfigError

BUCKET = 50_000_000
"""values that are sent at a time; DeepSpeed's own 500 million would set 2 GB aside on each worker"""


def ds_config(config: RunConfig, optim: OptimConfig) -> dict[str, Any]:
    """What DeepSpeed is told: the run's settings, and what its ds_config.json tunes. ConfigError as merged."""
    settings = run_settings(config, optim)
    for path, value in _tunings(config, settings).items():
        *sections, key = path.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return settings


def tuned_by(config: RunConfig) -> dict[str, Any]:
    """What the run's ds_config.json changes of what is computed, dotted path -> value: its part of the run's identity.

    Nothing under another engine, without a file, or where it says what the run says. ConfigError as `ds_config`.
    """
    if config.engine != "deepspeed":
        return {}
    own = run_settings(config, config.resolved_phases()[0].optim)
    found = _tunings(config, own).items()
    return {path: value for path, value in found if path not in TOLD and _at(own, path) != value}


def _tunings(config: RunConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    path = config.deepspeed.config
    return {} if path is None else tunings(own, read_ds_config(Path(path)), config, path)


def _at(settings: Mapping[str, Any], path: str) -> Any:
    place: Any = settings
    for key in path.split("."):
        place = place.get(key) if isinstance(place, Mapping) else None
    return place


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
