"""The small build tells the truth: about greater depth, about other numbers of rows, about real tensors."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainers.config import PrecisionConfig, RunConfig
from trainers.config_io import override
from trainers.data.types import Batch
from trainers.memory.recorder import ACTIVATIONS, GRADIENTS, LOGITS
from trainers.memory.small_build import SmallBuild
from trainers.memory.timeline import Timeline, read_timeline
from trainers.models import build_model, parameter_count
from trainers.objectives import build_objective
from trainers.precision import autocast
from trainers.presets import PRESETS
from trainers.weights import prepare_weights

ROOT = Path(__file__).parents[3]
VOCABULARY = 90
SMALL = ["model.d_model=48", "model.n_heads=4", "model.context_length=40", "model.n_layers=6"]
CASES: dict[str, list[str]] = {
    "gelu, dropout": ["model.dropout=0.1", "model.norm=layernorm"],
    "rotary swiglu": [
        *("model.dropout=0", "model.positions=rope_interleaved", "model.activation=swiglu"),
        *("model.bias=false", "model.tie_embeddings=false"),
    ],
    "deepnorm in bf16": [
        *("model.dropout=0", "model.norm=deepnorm", "model.norm_position=post", "precision.compute=bf16"),
    ],
    "recomputed": ["model.dropout=0", "model.activation_checkpointing=true"],
    "recomputed in bf16, dropout": [
        *("model.dropout=0.1", "model.activation_checkpointing=true", "precision.compute=bf16"),
    ],
    "smoothed labels": ["model.dropout=0", "optim.label_smoothing=0.1"],
    "int8 products": ["model.dropout=0", "precision.weights=int8", "precision.compute=bf16", "device=cpu"],
}


def case(name: str) -> RunConfig:
    return override(PRESETS["fundamentallm/small"](), [*SMALL, *CASES[name]])


def timeline(config: RunConfig, **more: Any) -> Timeline:
    return read_timeline(
        config.model,
        VOCABULARY,
        sequence_length=config.sequence_length,
        precision=config.precision,
        objective=build_objective(config),
        **more,
    )


@pytest.mark.parametrize("name", CASES)
def test_depth_is_extrapolated_exactly(name: str) -> None:
    config = case(name)
    layers = config.model.n_layers
    small, whole = timeline(config), timeline(config, depth=layers)
    assert (small.layers, whole.layers) == (3, layers)
    for rows in (1, 4, 32):
        for accumulates in (False, True):
            assert small.peak(rows, layers, accumulates=accumulates).sum() == pytest.approx(
                whole.peak(rows, layers, accumulates=accumulates).sum(), rel=1e-9
            )
        assert small.scoring_peak(rows, layers).sum() == pytest.approx(whole.scoring_peak(rows, layers).sum())
        assert small.saved_bytes(rows, layers) == whole.saved_bytes(rows, layers)
        assert small.saved_bytes(rows, layers - 1) < whole.saved_bytes(rows, layers)


def saved_by_hooks(config: RunConfig, rows: int) -> int:
    """What the forward pass of the real model keeps, each storage once, weights aside."""
    model = build_model(config.model, VOCABULARY)
    prepare_weights(model, config.precision)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.zeros((rows, config.sequence_length), dtype=torch.long)
    batch = Batch(tokens=tokens, targets=tokens.clone(), n_targets=tokens.numel(), starts=None)
    with autocast(config.precision, torch.device("cpu")):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = build_objective(config).loss(model, batch, None)
        assert torch.isfinite(loss.total)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", CASES)
def test_shapes_alone_tell_what_torchs_fake_tensors_tell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moment by moment, with the kernels of the CPU and with those of a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = case(name)
    ours = [timeline(config, kernels=kernels) for kernels in ("cpu", "cuda")]
    monkeypatch.setattr("trainers.memory.timeline.ShapesOnly", FakeTensorMode)
    theirs = [timeline(config, kernels=kernels) for kernels in ("cpu", "cuda")]
    for mine, other in zip(ours, theirs, strict=True):
        assert all(np.array_equal(one, two) for one, two in zip(arrays(mine), arrays(other), strict=True))
    wider = timeline(override(config, ["model.d_model=96"]))
    assert not np.array_equal(wider.first.fixed, theirs[0].first.fixed)


def arrays(law: Timeline) -> list[np.ndarray]:
    passes = [each for moments in (law.first, law.later, law.scoring) for each in asdict(moments).values()]
    return [*passes, law.saved]


def test_the_compiler_stays_away_and_works_afterwards() -> None:
    """In a process of its own: predicting imports no torch._dynamo, and leaves nothing in its place."""
    code = """
import sys, torch
from trainers.memory.prediction import timeline_of
from trainers.config_io import override
from trainers.presets import PRESETS
from torch.utils.checkpoint import checkpoint
config = override(PRESETS["fundamentallm/tiny"](), ["model.activation_checkpointing=true", "model.n_layers=4"])
before = timeline_of(config, 90, "cpu")
assert not [name for name in sys.modules if name.startswith("torch._dynamo")]
work = torch.compile(lambda x: checkpoint(torch.sin, x, use_reentrant=False) + 1, backend="eager")
x = torch.ones(3, requires_grad=True)
work(x).sum().backward()
assert torch.allclose(x.grad, torch.cos(torch.ones(3)))
import torch._dynamo
assert torch._dynamo.utils.counters["frames"]["total"] > 0, "nothing was compiled"
after = timeline_of(config, 90, "cpu")
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
assert before[0].peak(3, 4, accumulates=True).tolist() == after[0].peak(3, 4, accumulates=True).tolist()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_what_hooks_see_at_full_size(name: str) -> None:
    config = case(name)
    law = timeline(config)
    for rows in (2, 7):
        assert law.saved_bytes(rows, config.model.n_layers) == saved_by_hooks(config, rows)


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_the_one_of_real_tensors_at_full_depth(name: str) -> None:
    """The same steps on real memory, watched operation by operation."""
    config = case(name)
    rows, layers = 3, config.model.n_layers
    build = SmallBuild(config.model, VOCABULARY, config.sequence_length, config.precision, build_objective(config))
    traces = build.passes(rows).traces
    first, later, scoring = (float(trace.living.sum((1, 2)).max()) for trace in seen_at(traces, rows))
    law = timeline(config)
    assert law.peak(rows, layers, accumulates=False).sum() == pytest.approx(first, rel=1e-9)
    assert law.peak(rows, layers, accumulates=True).sum() == pytest.approx(later, rel=1e-9)
    assert law.scoring_peak(rows, layers).sum() == pytest.approx(scoring, rel=1e-9)


def seen_at(traces: Any, rows: int) -> Any:
    """Traces whose parts add up to bytes: what was taken for a row's, for all rows."""
    for trace in traces:
        trace.living[..., 1] *= rows
    return traces


@pytest.mark.parametrize("name", CASES)
def test_the_backward_pass_gives_back_what_the_forward_pass_kept(name: str) -> None:
    """Nothing of it is left at the end but the batch itself, and the graph was not kept by whoever watched it."""
    config = case(name)
    rows, layers = 16, config.model.n_layers
    law = timeline(config)
    moments = law.first.at(rows, layers - law.layers)
    assert moments[:, ACTIVATIONS].max() > 1e5
    if config.precision.compute == "fp32":  # else the half copies of the weights live as long as autocast
        assert moments[-1, ACTIVATIONS] + moments[-1, LOGITS] < 2 * 8 * rows * config.sequence_length
    values = parameter_count(config.model, VOCABULARY)
    assert moments[-1, GRADIENTS] == 4 * values


def test_gradients_that_stand_are_those_of_a_second_micro_batch() -> None:
    """A later micro-batch is told from the first one; the real second one takes as much."""
    config = case("gelu, dropout")
    rows, layers = 3, config.model.n_layers
    build = SmallBuild(config.model, VOCABULARY, config.sequence_length, config.precision, build_objective(config))
    build.model.train()
    build._record(rows, build._train)
    gradients = sum(p.grad.numel() * 4 for p in build.model.parameters() if p.grad is not None)
    second = build._record(rows, build._train).trace(rows)
    real = float((second.living[..., 0] + rows * second.living[..., 1]).sum(1).max()) + gradients
    assert timeline(config).peak(rows, layers, accumulates=True).sum() == pytest.approx(real, rel=1e-9)


def test_recomputing_keeps_less_and_a_gpu_keeps_no_attention_weights() -> None:
    plain, recomputed = case("gelu, dropout"), case("recomputed in bf16, dropout")
    assert timeline(recomputed).saved_bytes(8, 24) < 0.2 * timeline(plain).saved_bytes(8, 24)
    assert timeline(plain, kernels="cuda").saved_bytes(8, 24) < 0.7 * timeline(plain).saved_bytes(8, 24)
    without = override(plain, ["model.dropout=0"])
    assert timeline(without, kernels="cuda").saved_bytes(8, 24) == timeline(without).saved_bytes(8, 24)


def test_fp16_has_the_shapes_of_bf16() -> None:
    config = case("rotary swiglu")
    half = [config.model_copy(update={"precision": PrecisionConfig(compute=kind)}) for kind in ("bf16", "fp16")]
    bf16, fp16 = (timeline(each) for each in half)
    np.testing.assert_array_equal(bf16.peak(4, 6, accumulates=True), fp16.peak(4, 6, accumulates=True))
