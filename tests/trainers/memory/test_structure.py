"""Structural bytes are exact: against real builds where those are small, without allocating where they are not."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from tests.trainers.small_runs import config_for, write_text
from trainers.config import OptimConfig, RunConfig
from trainers.config_io import override
from trainers.memory.structure import read_structure
from trainers.memory.words import Spread, Words, words_of
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
    """Bytes a worker in half precision under Adam: 4 + 12/N, 2 + 14/N, 16/N for each parameter (stages 1, 2, 3)."""
    structure = read_structure(PRESETS["codelm/xlarge"]().model, 32_000)
    optim, workers, values = OptimConfig(), 8, structure.values
    for stage, bytes_each in ((0, 16), (1, 4 + 12 / workers), (2, 2 + 14 / workers), (3, 16 / workers)):
        state = structure.state_bytes(optim, Words(), Spread(stage, workers, half=True, master=True))
        held = state.weights - structure.buffer_bytes + state.gradients + state.optimizer
        assert held == pytest.approx(values * bytes_each, rel=1e-5)


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


def test_eight_bit_state_is_what_bitsandbytes_makes() -> None:
    """The same bytes as the optimizer's own tensors, the constants that all parameters share aside."""
    pytest.importorskip("bitsandbytes")
    from trainers.models import build_model
    from trainers.optim import CONSTANTS, build_optimizer, parameter_groups

    config = override(PRESETS["fundamentallm/small"](), ["device=cpu", "precision.optimizer_state=int8"])
    model = build_model(config.model, VOCABULARY)
    optimizer = build_optimizer(
        parameter_groups(model, config.optim), config.optim, torch.device("cpu"), config.precision
    )
    real = sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and name not in CONSTANTS
    )
    structure = read_structure(config.model, VOCABULARY)
    assert structure.state_bytes(config.optim, words_of(config.precision, config.optim)).optimizer == real
