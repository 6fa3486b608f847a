"""Laws of the engine in one process."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.config import OptimConfig, PrecisionConfig
from trainers.data.types import Batch
from trainers.engine import TorchEngine
from trainers.errors import CheckpointError, ConfigError, TrainingFailed
from trainers.incidents import DeviceIncidents, Update
from trainers.objectives.language_model import LanguageModel
from trainers.optim import parameter_groups
from trainers.weights import prepare_weights

VOCABULARY = 13
CPU = torch.device("cpu")
OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop")


class Tiny(nn.Module):
    """Embedding, hidden layer, tied head, a buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens)))) * self.scale, None


def build(
    model: nn.Module | None = None,
    *,
    compute: str = "fp32",
    bf16_weights: bool = False,
    compile: bool = False,
    **optim: Any,
) -> TorchEngine:
    model, precision = (
        model or Tiny(),
        PrecisionConfig.model_validate({"compute": compute, "bf16_weights": bf16_weights}),
    )
    prepare_weights(model, precision)
    return TorchEngine(
        model,
        optim=OptimConfig(**{"lr": 1e-2, "weight_decay": 0.1, **optim}),
        precision=precision,
        device=CPU,
        world_size=1,
        compile=compile,
        deterministic=False,
    )


def batch(step: int) -> Batch:
    rows = torch.randint(0, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(step))
    return Batch(rows[:, :-1], rows[:, 1:], 24)


def run_step(engine: TorchEngine, step: int, *, factor: float = 1.0, offset: float = 0.0) -> Update:
    """One update of one micro-batch, its loss times `factor` plus `offset`."""
    return run_step_with_loss(engine, step, factor, offset)[1]


def run_step_with_loss(
    engine: TorchEngine, step: int, factor: float = 1.0, offset: float = 0.0
) -> tuple[Tensor, Update]:
    data = batch(step)
    with engine.micro_batch(last=True) as model:
        loss = engine.normalise(LanguageModel().loss(model, data, None).total, data.n_targets) * factor + offset
        engine.backward(loss)
    return loss.detach(), engine.update(1e-2)


def everything(engine: TorchEngine) -> dict[str, Tensor]:
    return {f"{file}/{name}": t.clone() for file, part in engine.tensors().items() for name, t in part.items()}


def saved(engine: TorchEngine) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    tensors = {file: {name: t.clone() for name, t in part.items()} for file, part in engine.tensors().items()}
    return tensors, json.loads(json.dumps(engine.state()))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- the step ----------------------------------------------------------------------------------------


def test_losses_and_weights_have_the_bits_of_a_plain_loop() -> None:
    engine, model = build(), Tiny()
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    optimizer = torch.optim.AdamW([{**g, "params": [p for _, p in g["params"]]} for g in groups], lr=1e-2, fused=True)
    for step in range(20):
        data = batch(step)
        loss = F.cross_entropy(model(data.tokens)[0].flatten(0, 1), data.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert torch.equal(run_step_with_loss(engine, step)[0], loss.detach())
    assert all(torch.equal(a, b) for a, b in zip(engine.module.parameters(), model.parameters(), strict=True))


def test_the_norm_is_taken_before_clipping_and_the_gradient_is_clipped() -> None:
    norms = []
    for limit in (None, 1e-3):
        engine = build(name="sgd", momentum=0.0, weight_decay=0.0, clip_norm=limit)
        before = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
        norms.append(float(run_step(engine, 0).grad_norm))
        after = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
        moved = float((after - before).norm()) / 1e-2
        assert moved == pytest.approx(limit or norms[0], rel=1e-3)
    assert norms[0] == norms[1] > 1e-3


def test_bf16_keeps_weights_moments_and_gradients_in_fp32() -> None:
    engine, seen = build(compute="bf16"), []
    engine.module.hidden.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))  # type: ignore[union-attr]
    with engine.micro_batch(last=True) as model:
        engine.backward(LanguageModel().loss(model, batch(0), None).total)
    assert seen == [torch.bfloat16]
    assert {p.grad.dtype for p in engine.module.parameters() if p.grad is not None} == {torch.float32}
    engine.update(1e-2)
    assert {t.dtype for t in everything(engine).values()} == {torch.float32}


# ---- non-finite --------------------------------------------------------------------------------------


def on_device(engine: TorchEngine) -> TorchEngine:
    """The path that CUDA takes, on the CPU: torch's fused CPU kernels honour found_inf as the CUDA ones do."""
    engine.decides_on_device = True
    engine.skipped.counts = DeviceIncidents(CPU)
    return engine


@pytest.mark.parametrize("decide", [lambda engine: engine, on_device], ids=["host", "device"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [{"factor": float("nan")}, {"factor": float("inf")}, {"offset": float("inf")}])
def test_a_non_finite_loss_changes_nothing_and_is_counted(decide: Any, optimizer: str, bad: dict[str, float]) -> None:
    engine, undisturbed = decide(build(name=optimizer)), build(name=optimizer)
    run_step(engine, 99, **bad)  # as the very first update too
    assert same(everything(engine), everything(undisturbed))
    run_step(engine, 0)
    before = everything(engine)
    run_step(engine, 1, **bad)
    assert bool(run_step(engine, 2, **bad).skipped) and same(everything(engine), before)
    assert engine.skipped.total() == 3
    assert [engine.skipped.take_longest(), engine.skipped.take_longest()] == [2, 0]
    assert not bool(run_step(engine, 3).skipped) and not same(everything(engine), before)
    for step in (0, 3):  # as if the bad batches had never been
        run_step(undisturbed, step)
    assert same(everything(engine), everything(undisturbed))


def test_a_single_bad_gradient_is_found() -> None:
    engine = build()
    before = everything(engine)
    with engine.micro_batch(last=True) as model:
        engine.backward(model(batch(0).tokens)[0].square().mean())
    engine.module.hidden.bias.grad[3] = float("nan")
    assert engine.update(1e-2).skipped and same(everything(engine), before)


def test_the_host_asks_at_once_and_the_device_only_on_logging_steps() -> None:
    host, device = build(), on_device(build())
    on_host, later = (run_step(engine, 0, factor=float("nan")) for engine in (host, device))
    assert host.skipped.should_check(on_host) and not device.skipped.should_check(later)
    assert device.skipped.should_check(later, logging=True)
    assert not host.skipped.should_check(run_step(host, 1))


# ---- state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restart_is_invisible(optimizer: str) -> None:
    whole = build(name=optimizer)
    for step in range(3):
        run_step(whole, step)
    run_step(whole, 3, factor=float("nan"))
    again, forgetful = build(name=optimizer), build(name=optimizer)
    files, state = saved(whole)
    again.load(files, state, optimizer=True)
    forgetful.load(files, state, optimizer=False)  # negative control: the moments are withheld
    for engine in (whole, again, forgetful):
        for step in range(4, 8):
            run_step(engine, step)
    assert same(everything(again), everything(whole)) and again.state() == whole.state()
    assert not same(everything(forgetful), everything(whole))


def test_names_are_the_models_own_and_tied_weights_stand_once() -> None:
    names = {"embedding.weight", "hidden.weight", "hidden.bias"}
    for engine in (build(), build(compile=True)):
        tensors = engine.tensors()
        assert tensors["model"].keys() == names | {"scale"}
        assert tensors["optimizer"].keys() == {
            f"{kind}/{n}" for kind in ("exp_avg", "exp_avg_sq", "step") for n in names
        }


def test_tensors_are_live() -> None:
    engine = build()
    tensors = engine.tensors()
    assert tensors["model"]["hidden.weight"].data_ptr() == engine.module.hidden.weight.data_ptr()
    before = tensors["optimizer"]["exp_avg/hidden.weight"].clone()
    run_step(engine, 0)
    assert not torch.equal(tensors["optimizer"]["exp_avg/hidden.weight"], before)


def test_tensors_that_do_not_fit_are_refused_by_name_and_change_nothing() -> None:
    engine = build()
    files, state = saved(build())
    files["model"].pop("hidden.bias")
    files["model"]["hidden.weight"] = torch.zeros(3, 3)
    files["model"]["extra"] = torch.zeros(1)
    files["model"]["embedding.weight"].zero_()
    before = everything(engine)
    with pytest.raises(CheckpointError, match=r"hidden.bias is missing.*extra is unknown.*hidden.weight is .*\(3, 3\)"):
        engine.load(files, state, optimizer=True)
    assert same(everything(engine), before)


def test_weights_alone_can_be_taken_over() -> None:
    source, engine = build(), build()
    run_step(source, 0)
    engine.load({"model": source.tensors()["model"]}, {}, optimizer=False)
    assert same(engine.tensors()["model"], source.tensors()["model"])
    assert all(not t.any() for t in engine.tensors()["optimizer"].values())


def test_weights_of_another_type_are_a_start_and_nothing_to_go_on_with() -> None:
    """bf16 weights from an fp32 run are rounded to the nearest, fp32 ones from a bf16 run are widened exactly."""
    wide, half = build(), build(compute="bf16", bf16_weights=True)
    run_step(wide, 0)
    run_step(half, 0)
    for source, kind in ((wide, {"compute": "bf16", "bf16_weights": True}), (half, {})):
        files, state = saved(source)
        engine = build(**kind)
        before, own = everything(engine), {name: t.dtype for name, t in engine.tensors()["model"].items()}
        with pytest.raises(CheckpointError, match=r"hidden\.weight is"):
            engine.load(files, state, optimizer=True)
        assert same(everything(engine), before)
        engine.load(files, {}, optimizer=False)
        for name, tensor in engine.tensors()["model"].items():
            assert tensor.dtype == own[name]
            assert torch.equal(tensor, files["model"][name].to(tensor.dtype))
    files["model"]["hidden.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"hidden.weight is .*\(3, 3\)"):
        build().load(files, {}, optimizer=False)


def test_a_phase_takes_new_settings_and_fresh_or_kept_moments() -> None:
    for keep in (False, True):
        engine = build()
        run_step(engine, 0)
        moments = {name: t.clone() for name, t in engine.tensors()["optimizer"].items()}
        engine.begin_phase(OptimConfig(weight_decay=0.3, decay="all", betas=(0.8, 0.9)), keep_optimizer=keep)
        assert [(g["weight_decay"], g["betas"]) for g in engine.optimizer.param_groups] == [(0.3, (0.8, 0.9))]
        now = engine.tensors()["optimizer"]
        assert same(now, moments) if keep else all(not t.any() for t in now.values())
        run_step(engine, 1)


def test_moments_of_another_optimizer_cannot_be_kept() -> None:
    with pytest.raises(ConfigError, match="hand_over=weights"):
        build().begin_phase(OptimConfig(name="sgd"), keep_optimizer=True)


# ---- fp16 (the arithmetic runs on a CPU, slowly, on a tiny model) ------------------------------------


def test_under_fp16_an_overflow_lowers_the_scale_and_is_no_incident() -> None:
    engine = build(compute="fp16")
    assert engine.scaler is not None
    before = everything(engine)
    assert run_step(engine, 0, factor=1e6).skipped and same(everything(engine), before)
    assert engine.skipped.total() == 0 and engine.scaler.state()["scale"] == 2.0**15
    run_step(engine, 0)
    assert not same(everything(engine), before)


@pytest.mark.parametrize("on_device", [False, True])
def test_under_fp16_a_bad_loss_is_an_incident_and_says_nothing_about_the_scale(on_device: bool) -> None:
    """With the counters of an accelerator too, whose arithmetic is the same."""
    engine = build(compute="fp16")
    assert engine.scaler is not None
    if on_device:
        engine.skipped.counts = DeviceIncidents(CPU)
    run_step(engine, 1)
    before, scale = everything(engine), engine.scaler.state()
    for bad in (float("nan"), float("inf")):
        assert run_step(engine, 0, factor=bad).skipped
    assert same(everything(engine), before) and engine.scaler.state() == scale
    assert (engine.skipped.take_longest(), engine.skipped.total()) == (2, 2)
    assert run_step(engine, 0, factor=1e6).skipped  # the flag is of one update: this is an overflow again
    assert engine.skipped.total() == 2 and engine.scaler.state()["scale"] == 2.0**15


def test_the_fp16_scale_survives_a_restart() -> None:
    whole = build(compute="fp16")
    run_step(whole, 0, factor=1e6)
    again = build(compute="fp16")
    again.load(*saved(whole), optimizer=True)
    for engine in (whole, again):
        run_step(engine, 1)
    assert again.state() == whole.state() and same(everything(again), everything(whole))
    assert again.state()["scaler"]["scale"] == 2.0**15


def test_fp16_that_overflows_at_the_smallest_scale_ends_with_a_reason() -> None:
    engine = build(compute="fp16")
    for _ in range(17):
        run_step(engine, 0, factor=1e12)
    with pytest.raises(TrainingFailed, match="loss scale"):
        engine.skipped.total()
