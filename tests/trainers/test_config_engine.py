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
from trainers.config_io import build_config, differences, fingerprint, fingerprint_fields
from trainers.deepspeed_config import BUCKET, check_deepspeed, ds_config, tuned_by
from trainers.deepspeed_file import TUNABLE, ZERO
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
        ({"compile": True, "deepspeed": {"zero_stage": 3}}, "compile=true with deepspeed.zero_stage=3"),
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
    deepspeed(engine="torch", parallel="fsdp", precision={"compute": "bf16"}, compile=True)
    deepspeed(deepspeed={"zero_stage": 2}, compile=True)


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
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, 'is "big" there, and must be a whole number, 1 or more'),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "must be a whole number, 1 or more"),
        ({"zero_optimization": {"allgather_bucket_size": 1.5}}, "must be a whole number, 0 or more"),
        ({"zero_optimization": {"sub_group_size": True}}, "must be a whole number, 0 or more"),
        ({"zero_optimization": {"overlap_comm": 1}}, "must be true or false"),
        ({"comms_logger": {"prof_ops": "all"}}, "must be a list of texts"),
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


def test_none_is_a_device_only_where_the_run_offloads_nothing(tmp_path: Path) -> None:
    for nothing in ({"device": "none"}, {"device": None}, None):
        content = {"zero_optimization": {"offload_optimizer": nothing}}
        config = with_file(tmp_path / "ds.json", content)
        assert "offload_optimizer" not in ds_config(config, config.optim)["zero_optimization"]
        offloads = config.deepspeed.model_copy(update={"offload_optimizer": True})
        with pytest.raises(ConfigError, match="offload_optimizer"):
            ds_config(config.model_copy(update={"deepspeed": offloads}), config.optim)


def test_whole_numbers_may_be_written_as_these_files_have_them(tmp_path: Path) -> None:
    content = '{"zero_optimization": {"reduce_bucket_size": 5e8, "sub_group_size": null, "overlap_comm": "auto"}}'
    config = with_file(tmp_path / "ds.json", content)
    told = ds_config(config, config.optim)["zero_optimization"]
    assert (told["reduce_bucket_size"], type(told["reduce_bucket_size"])) == (500_000_000, int)
    assert "sub_group_size" not in told and "overlap_comm" not in told


@pytest.mark.parametrize("path", TUNABLE)
def test_deepspeed_takes_what_we_let_through_and_not_what_we_refuse(path: str) -> None:
    """Its own schema is the judge of ours."""
    pytest.importorskip("deepspeed")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    top, *sections, key = path.split(".") if "." in path else ("", path)
    schema = {ZERO: DeepSpeedZeroConfig, "comms_logger": CommsLoggerConfig}.get(top)
    if schema is None:
        return  # read by hand there, without a check

    def taken(value: Any) -> bool:
        data = {key: value}
        for section in reversed(sections):
            data = {section: data}
        try:
            schema(**data)
        except ValidationError:
            return False
        return True

    takes = TUNABLE[path]
    right, wrong = {"switch": (True, "big"), "names": (["all_reduce"], "big")}.get(str(takes), (takes, "big"))
    assert taken(right) and not taken(wrong)
    assert not isinstance(takes, int) or "module_granularity" in path or not taken(takes - 1)


def test_the_identity_of_a_run_knows_what_its_file_tunes_and_not_where_it_lies(tmp_path: Path) -> None:
    tuned = {"zero_optimization": {"reduce_bucket_size": 1000}}

    def fields(name: str, content: object) -> dict[str, Any]:
        config = with_file(tmp_path / name, content)
        found = fingerprint_fields(config, ("h",), "", tuned_by(config))
        assert (fingerprint(config, ("h",), "", tuned_by(config)) == digest) == (found == plain)
        return found

    bare = deepspeed(deepspeed={"zero_stage": 2})
    plain = fingerprint_fields(bare, ("h",), "", tuned_by(bare))
    digest = fingerprint(bare, ("h",), "", tuned_by(bare))
    assert fields("a.json", tuned) == fields("b.json", {**tuned, "steps_per_print": 7, "train_batch_size": 8}) != plain
    assert fields("c.json", {"zero_optimization": {"reduce_bucket_size": BUCKET}}) == plain  # what the run says anyway
    other = fields("a.json", {"zero_optimization": {"reduce_bucket_size": 2000}})  # the same path, another content
    assert differences(fields("b.json", tuned), other) == [
        "deepspeed.config.zero_optimization.reduce_bucket_size: 1000 -> 2000"
    ]
    assert with_workers_of(plain, other) == other  # as all of the engine's settings
    by_path = fingerprint_fields(with_file(tmp_path / "a.json", tuned), ("h",))
    assert by_path != fingerprint_fields(with_file(tmp_path / "b.json", tuned), ("h",))  # the negative control


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
