"""Structural bytes are exact: against real builds where those are small, without allocating where they are not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
import torch

from tests.trainers.small_runs import config_for, write_text
from trainers.config import OptimConfig, RunConfig
from trainers.config_io import override
from trainers.memory.structure import read_structure
from trainers.memory.words import Words, spread_of, words_of
from trainers.models import parameter_count
from trainers.presets import PRESETS
from trainers.scratch import scratch_run

OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop")
VOCABULARY = 97


def vocabulary(config: RunConfig) -> int:
    return config.model.vocab_size or config.tokenizer.vocab_size or VOCABULARY


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_counted_without_its_memory(name: str) -> None:
    config = PRESETS[name]()
    before = psutil.Process().memory_info().rss
    structure = read_structure(config.model, vocabulary(config))
    state = structure.state_bytes(config.optim, Words())
    assert structure.values == parameter_count(config.model, vocabulary(config)) <= 1_500_000_000
    assert state.weights - structure.buffer_bytes == state.gradients == 4 * structure.values
    assert state.optimizer == 8 * structure.values + 4 * len(structure.parameters)
    assert psutil.Process().memory_info().rss - before < max(64 << 20, state.weights // 8)


SHAPES = {
    "learned": [],
    "untied sinusoids": ["model.tie_embeddings=false", "model.positions=sinusoidal", "model.norm=layernorm"],
    "rotary swiglu": ["model.positions=rope", "model.activation=swiglu", "model.bias=false", "model.n_layers=3"],
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_a_real_run(shape: str, optimizer: str, tmp_path: Path) -> None:
    """Weights with their tables, optimizer state, gradients, the snapshot and the files of a checkpoint."""
    config = override(config_for(write_text(tmp_path)), [*SHAPES[shape], f"optim.name={optimizer}"])
    with scratch_run(config, tmp_path / "cache") as (run, phase):
        structure = read_structure(config.model, run.data.tokenizer.vocab_size)
        state = structure.state_bytes(config.optim, Words())
        tensors = run.engine.tensors()
        assert state.optimizer == sum(t.numel() * t.element_size() for t in tensors["optimizer"].values())
        held = {t.data_ptr(): t.numel() * t.element_size() for t in (*run.model.parameters(), *run.model.buffers())}
        assert state.weights == sum(held.values())
        batch = phase.loader.micro_batches(0)[0]
        run.objective.loss(run.model, batch, None).total.backward()
        gradients = (p.grad for p in run.model.parameters())
        assert state.gradients == sum(g.numel() * g.element_size() for g in gradients if g is not None)
        assert structure.snapshot_bytes(config.optim, Words()) == run.store.snapshot_bytes
        run.progress.step = 1
        run.save(phase, wait=True)
        files = (run.ctx.run_dir / "checkpoints" / "step-00000001").glob("*.safetensors")
        assert structure.checkpoint_bytes(config.optim, Words()) == sum(file.stat().st_size for file in files)
        assert structure.checkpoint_bytes(OptimConfig(name="sgd", momentum=0.0), Words()) != structure.checkpoint_bytes(
            config.optim, Words()
        )


def test_zero_spreads_what_its_stage_says() -> None:
    """Bytes a worker under Adam for each parameter: in half precision 4 + 12/N, 2 + 14/N, 16/N (stages 1, 2, 3); in
    fp32 the masters come on top of 16; at stage 0 nothing is shared out, and weights are fp32 without masters."""
    base = override(PRESETS["codelm/xlarge"](), ["workers=8", "batch.sequences=64", "engine=deepspeed", "device=cpu"])
    structure = read_structure(base.model, 32_000)
    n, values = base.workers, structure.values

    def bytes_each(stage: int, compute: str) -> float:
        config = override(base, [f"deepspeed.zero_stage={stage}", f"precision.compute={compute}"])
        words = words_of(config.precision, config.optim)
        state = structure.state_bytes(config.optim, words, spread_of(config, "cpu"))
        return (state.weights - structure.buffer_bytes + state.gradients + state.optimizer) / values

    assert [bytes_each(stage, "bf16") for stage in range(4)] == pytest.approx(
        [16, 4 + 12 / n, 2 + 14 / n, 16 / n], rel=1e-4
    )
    assert [bytes_each(stage, "fp32") for stage in range(4)] == pytest.approx(
        [16, 8 + 12 / n, 4 + 16 / n, 20 / n], rel=1e-4
    )


def test_offloading_frees_a_gpu_and_nothing_else() -> None:
    """On a CPU the state stays in the same memory."""
    base = override(
        PRESETS["codelm/tiny"](),
        [
            *("workers=2", "batch.sequences=16", "engine=deepspeed", "deepspeed.zero_stage=3"),
            *("deepspeed.offload_optimizer=true", "deepspeed.offload_parameters=true"),
        ],
    )
    structure = read_structure(base.model, 32_000)
    gpu, cpu = (structure.state_bytes(base.optim, Words(), spread_of(base, device)) for device in ("cuda", "cpu"))
    assert gpu.optimizer == 0 and gpu.weights == structure.buffer_bytes and gpu.gradients == cpu.gradients
    plain = override(base, ["deepspeed.offload_optimizer=false", "deepspeed.offload_parameters=false"])
    assert cpu == structure.state_bytes(base.optim, Words(), spread_of(plain, "cuda"))
    assert cpu.optimizer > cpu.weights > structure.values


def test_words_follow_the_configuration() -> None:
    """Eight-bit state is for large tensors; bf16 weights halve weights and gradients."""
    base = override(PRESETS["codelm/tiny"](), ["device=cpu"])
    structure = read_structure(base.model, 32_000)
    plain = structure.state_bytes(base.optim, Words())

    def state(*settings: str) -> tuple[float, float, float]:
        config = override(base, list(settings))
        found = structure.state_bytes(config.optim, words_of(config.precision, config.optim))
        return found.weights / plain.weights, found.gradients / plain.gradients, found.optimizer / plain.optimizer

    assert state() == (1, 1, 1)
    weights, gradients, optimizer = state("precision.optimizer_state=int8")
    assert (weights, gradients) == (1, 1) and 0.25 < optimizer < 0.27
    assert state("precision.optimizer_state=int8", "optim.min_8bit_size=1000000000")[2] == pytest.approx(1, abs=1e-5)
    halves = state("precision.compute=bf16", "precision.bf16_weights=true")
    assert halves[:2] == pytest.approx((0.5, 0.5)) and halves[2] == 1


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Each storage once."""
    kept = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


@pytest.mark.parametrize("bits", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["adamw", "lion", "ademamix", "sgd"])
def test_state_is_what_bitsandbytes_makes(name: str, bits: str) -> None:
    """The same bytes as the optimizer's own tensors, the constants that all parameters share aside."""
    pytest.importorskip("bitsandbytes")
    from trainers.models import build_model
    from trainers.optim import CONSTANTS, build_optimizer, parameter_groups

    settings = [f"optim.name={name}", f"precision.optimizer_state={bits}", "model.d_ff=333"]  # blocks that are not full
    config = override(PRESETS["fundamentallm/small"](), ["device=cpu", *settings])
    model = build_model(config.model, VOCABULARY)
    optimizer = build_optimizer(
        parameter_groups(model, config.optim), config.optim, torch.device("cpu"), config.precision
    )
    real = [
        tensor
        for state in optimizer.state.values()
        for kind, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and kind not in CONSTANTS
    ]
    structure = read_structure(config.model, VOCABULARY)
    counted = structure.state_bytes(config.optim, words_of(config.precision, config.optim)).optimizer
    assert counted == bytes_of(real)
    other = config.precision.model_copy(update={"optimizer_state": "int8" if bits == "fp32" else "fp32"})
    assert counted != structure.state_bytes(config.optim, words_of(other, config.optim)).optimizer


@pytest.mark.parametrize("weights", ["native", "nf4"])
def test_a_frozen_base_and_its_adapters_are_those_that_are_made(weights: str) -> None:
    """Codes, scales, their means and tables; adapters, their gradients and their state."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from trainers.adapters import adapt
    from trainers.models import build_model
    from trainers.nf4 import Nf4Linear
    from trainers.optim import build_optimizer, parameter_groups

    settings = [f"precision.weights={weights}", "precision.adapter_rank=4", "init_from=base", "model.d_ff=333"]
    config = override(PRESETS["fundamentallm/small"](), ["device=cpu", *settings])
    model = build_model(config.model, VOCABULARY)
    adapt(model, config.precision)
    quantised = [module for module in model.modules() if isinstance(module, Nf4Linear)]
    assert bool(quantised) == (weights == "nf4")
    beside = [each for layer in quantised for each in (*layer.scales().values(), layer.quant_state.code)]
    structure = read_structure(config.model, VOCABULARY)
    words = words_of(config.precision, config.optim)
    state = structure.state_bytes(config.optim, words)
    assert state.weights == bytes_of([*model.parameters(), *model.buffers(), *beside])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert state.gradients == bytes_of(trained)
    optimizer = build_optimizer(
        parameter_groups(model, config.optim), config.optim, torch.device("cpu"), config.precision
    )
    assert state.optimizer == bytes_of(tensor for kept in optimizer.state.values() for tensor in kept.values())
    assert structure.state_bytes(config.optim, Words()).gradients > 10 * state.gradients
