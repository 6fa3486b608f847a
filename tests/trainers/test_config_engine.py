"""What goes with which engine, and what a ds_config.json may say: all refused before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainers import deepspeed_config
from trainers.config import RunConfig
from trainers.config_io import build_config, fingerprint_fields
from trainers.deepspeed_config import check_deepspeed, ds_config
from trainers.errors import ConfigError
from trainers.identity import with_workers_of

PHASES = [{"name": "a", "optim": {"name": "adamw"}}, {"name": "b", "optim": {"name": "sgd"}}]


def deepspeed(**changes: Any) -> RunConfig:
    settings = {"batch": {"sequences": 8, "micro_sequences": 2}, "workers": 2, **changes}
    return build_config({"engine": "deepspeed", **settings})


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"engine": "torch", "deepspeed": {"zero_stage": 3}}, "deepspeed.zero_stage would do nothing"),
        ({"parallel": "fsdp"}, "parallel=fsdp is an option of engine=torch"),
        ({"deepspeed": {"zero_stage": 2, "offload_parameters": True}}, "needs deepspeed.zero_stage=3"),
        ({"deepspeed": {"zero_stage": 0, "offload_optimizer": True}}, "needs deepspeed.zero_stage=1, 2 or 3"),
        (
            {"precision": {"weights": "nf4", "adapter_rank": 8}, "init_from": "x", "deepspeed": {"zero_stage": 3}},
            "quantised ones are packed whole",
        ),
        ({"precision": {"optimizer_state": "int8"}}, "8-bit state could not be saved"),
        ({"precision": {"compute": "bf16", "bf16_weights": True}}, "fp32 master weights"),
        ({"optim": {"name": "lion"}}, "its state cannot be read back"),
        ({"compile": True}, "compile=true with engine=deepspeed"),
        ({"device": "mps"}, "not supported on device=mps"),
        ({"phases": PHASES}, "lays out its optimizer once"),
        ({"engine": "torch", "parallel": "fsdp", "precision": {"optimizer_state": "int8"}}, "blocks of whole tensors"),
        ({"engine": "torch", "parallel": "fsdp", "precision": {"weights": "int8"}}, "quantised weights are packed"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        deepspeed(**settings)


def test_what_does_go_together_is_taken() -> None:
    for stage in range(4):
        deepspeed(deepspeed={"zero_stage": stage}, precision={"compute": "bf16"})
    deepspeed(deepspeed={"zero_stage": 3, "offload_parameters": True, "offload_optimizer": True})
    deepspeed(engine="torch", parallel="fsdp", precision={"compute": "bf16"})


def test_the_engine_and_the_workers_are_all_that_a_run_may_change_when_it_is_reshaped() -> None:
    one = fingerprint_fields(build_config({"batch": {"sequences": 8, "micro_sequences": 2}}), ("h",))
    for other in (deepspeed(), deepspeed(deepspeed={"zero_stage": 3}), deepspeed(engine="torch", parallel="fsdp")):
        fields = fingerprint_fields(other, ("h",))
        assert fields != one and with_workers_of(one, fields) == fields and with_workers_of(fields, one) == one
    fields = fingerprint_fields(deepspeed(seed=1), ("h",))
    assert with_workers_of(one, fields) != fields  # the negative control


# ---- ds_config.json ---------------------------------------------------------------------------------------


def with_file(path: Path, content: object, **changes: Any) -> RunConfig:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed(deepspeed={"zero_stage": 2, "config": str(path)}, **changes)


def test_a_file_tunes_what_it_may_and_agrees_with_the_rest(tmp_path: Path) -> None:
    config = with_file(
        tmp_path / "ds.json",
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "none"}},
            "bf16": {"enabled": False},
            "fp16": {"enabled": False, "loss_scale_window": 1000},
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.999]}},
            "flops_profiler": {"enabled": False},
        },
    )
    told = ds_config(config, config.optim)
    assert told["zero_optimization"]["reduce_bucket_size"] == 1000
    assert told["zero_optimization"]["stage"] == 2 and "optimizer" not in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16 there, and 8 by batch.sequences here"),
        ({"gradient_clipping": 0.5}, "and 1.0 by optim.clip_norm"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3 there, and 2 by deepspeed.zero_stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "not set by deepspeed.offload_optimizer"),
        ({"bf16": {"enabled": True}}, "and false by precision.compute"),
        ({"optimizer": {"type": "Lamb"}}, "by optim.name"),
        ({"optimizer": {"params": {"lr": 1.0}}}, "by optim.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, "the schedule is the run's"),
        ({"activation_checkpointing": {"partition_activations": True}}, "set model.activation_checkpointing"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "not known to leave the training"),
        ({"tensor_parallel": {"autotp_size": 2}}, "not known to leave the training"),
        ("[1]", "must be a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_a_file_that_contradicts_the_run_is_refused_by_key_and_value(
    tmp_path: Path, content: object, told: str
) -> None:
    config = with_file(tmp_path / "ds.json", content)
    with pytest.raises(ConfigError) as refused:
        check_deepspeed(config, "cpu")
    assert told in str(refused.value)


def test_a_missing_file_or_package_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        check_deepspeed(deepspeed(deepspeed={"config": str(tmp_path / "none.json")}), "cpu")
    monkeypatch.setattr(deepspeed_config, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        check_deepspeed(deepspeed(), "cpu")
    check_deepspeed(build_config({}), "cpu")  # another engine needs nothing


def test_the_rules_load_nothing_heavy() -> None:
    code = "import sys, trainers.deepspeed_config as d; assert not {'torch', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
