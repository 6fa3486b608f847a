"""The checks of the GPU paths, made on the CPU: each passes on sound code and fails on code that was spoilt."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu_arithmetic, gpu_memory, gpu_ranks
from benchmarks.gpu_checks import CHECKS
from benchmarks.gpu_rig import CPU, Rig
from trainers.batch_probe import Probe
from trainers.engine import TorchEngine
from trainers.models.kv_cache import KvCache
from trainers.precision import LossScaler
from trainers.snapshot import SnapshotBuffer

KNOWN = {check.name: check for check in CHECKS}
CUDA_ONLY = ("tf32_losses", "quiet_steps", "predicted_memory")
SLOW = ("compiled_losses", "several_ranks", "out_of_memory", "four_bit_base", "zero_stages")
"""which start processes, compile, or import for seconds"""
Spoil = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """Whose losses of reference are those of sound code."""
    rig = Rig(CPU, tmp_path_factory.mktemp("rig"), tiny=True)
    assert rig.reference and rig.plain
    return rig


@pytest.fixture
def rig(sound: Rig, tmp_path: Path) -> Rig:
    """A rig with folders of its own and the reference of sound code."""
    fresh = Rig(CPU, tmp_path, tiny=True)
    vars(fresh).update({name: vars(sound)[name] for name in ("reference", "plain", "text")})
    return fresh


@pytest.mark.parametrize("name", sorted(KNOWN.keys() - set(SLOW) - set(CUDA_ONLY)))
def test_a_check_passes_on_sound_code(name: str, rig: Rig) -> None:
    if name == "eight_bit_state":
        pytest.importorskip("bitsandbytes")
    finding = KNOWN[name].found(rig)
    assert finding.verdict == "pass", finding
    assert finding.claim.endswith(".") and finding.figures and any(f.bar is not None for f in finding.figures)


@pytest.mark.parametrize("name", CUDA_ONLY)
def test_a_check_that_a_cpu_cannot_make_is_skipped_with_its_reason(name: str, rig: Rig) -> None:
    finding = KNOWN[name].found(rig)
    assert finding.verdict == "skipped" and len(finding.reason.split()) > 4


# ---- each check, with its path spoilt ---------------------------------------------------------------------------


def never_half(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("trainers.engine.autocast", lambda precision, device: nullcontext())


def attend_forwards(patch: pytest.MonkeyPatch) -> None:
    attention = torch.nn.functional.scaled_dot_product_attention
    patch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **kw: attention(*a, **{**kw, "is_causal": False}),
    )


def keep_the_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LossScaler, "update", lambda self, overflowed, *, counted=True: None)


def always_step(patch: pytest.MonkeyPatch) -> None:
    def step(self: TorchEngine, norm: Tensor) -> bool:
        self.optimizer.step()
        return False

    patch.setattr(TorchEngine, "_step_on_host", step)


def inexact_sums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gpu_arithmetic, "int8_product", lambda a, b: (a.float() @ b.float().t()).bfloat16().float())


def no_int8_layer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gpu_arithmetic, "Int8Linear", nn.Linear)


def no_int8_model(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("trainers.weights.use_int8", lambda model: [])


def nearest(patch: pytest.MonkeyPatch) -> None:
    for place in ("trainers.rounding", "benchmarks.gpu_arithmetic"):
        patch.setattr(f"{place}.round_stochastically", lambda values, generator: values.bfloat16())


def forgetful_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KvCache, "commit", lambda self: None)


def other_masks(patch: pytest.MonkeyPatch) -> None:
    from torch.utils.checkpoint import checkpoint

    patch.setattr("trainers.models.gpt.checkpoint", functools.partial(checkpoint, preserve_rng_state=False))


def last_micro_batch_alone(patch: pytest.MonkeyPatch) -> None:
    backward = TorchEngine.backward

    def overwrite(self: TorchEngine, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        backward(self, loss)

    patch.setattr(TorchEngine, "backward", overwrite)


def forgotten_moments(patch: pytest.MonkeyPatch) -> None:
    load = TorchEngine.load
    patch.setattr(
        TorchEngine, "load", lambda self, files, state, *, optimizer: load(self, files, state, optimizer=False)
    )


def live_snapshot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SnapshotBuffer, "copy", lambda self, tensors: dict(tensors))


def wide_state(patch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    import trainers.optim_8bit as optim_8bit

    construct = optim_8bit._construct
    patch.setattr(optim_8bit, "_construct", lambda groups, optim, bits: construct(groups, optim, 32))


class Louder(nn.Module):
    """A wrapper that changes what the model says."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> Any:
        logits, state = self.model(*arguments)
        return 1.5 * logits, state


def wrong_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "compile", Louder)


def lonely_ranks(patch: pytest.MonkeyPatch) -> None:
    """Each trains on its own half."""

    def spawn(target: Any, args: tuple[str, str, bool], nprocs: int) -> None:
        own = Rig(CPU, Path(args[1]), tiny=True)
        for kind in gpu_ranks.KINDS:
            losses = [loss * 1.001 for loss in own.losses(own.config(), gpu_ranks.STEPS)]
            (own.folder / "ranks" / f"{kind}.json").write_text(json.dumps(losses))

    patch.setattr(gpu_ranks, "spawn", spawn)


def untold_accident(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gpu_memory, "probed", lambda rig, config, rows, limit: Probe(rows, "killed"))


SPOILT: list[tuple[str, Spoil]] = [
    ("fp32_losses", attend_forwards),
    ("bf16_losses", never_half),
    ("fp16_losses", never_half),
    ("fp16_overflow", keep_the_scale),
    ("fp16_overflow", always_step),
    ("int8_sums", inexact_sums),
    ("int8_layer", no_int8_layer),
    ("int8_losses", no_int8_model),
    ("stochastic_rounding", nearest),
    ("bf16_weights", nearest),
    ("cached_reading", forgetful_cache),
    ("recomputed_gradients", other_masks),
    ("accumulated_gradients", last_micro_batch_alone),
    ("nonfinite_update", always_step),
    ("compiled_losses", wrong_kernels),
    ("exact_resume", forgotten_moments),
    ("pinned_snapshot", live_snapshot),
    ("out_of_memory", untold_accident),
    ("several_ranks", lonely_ranks),
    ("eight_bit_state", wide_state),
]


@pytest.mark.parametrize(("name", "spoil"), SPOILT, ids=[f"{name}-{spoil.__name__}" for name, spoil in SPOILT])
def test_a_check_fails_on_spoilt_code(name: str, spoil: Spoil, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    if name == "fp32_losses":
        del vars(rig)["plain"]  # the device's own, computed anew
    finding = KNOWN[name].found(rig)
    assert finding.verdict == "fail", finding
    assert finding.reason


def test_every_check_that_a_cpu_makes_has_a_negative_control() -> None:
    """But those of whole packages, which the slow rehearsal covers."""
    assert KNOWN.keys() - {name for name, _ in SPOILT} - set(CUDA_ONLY) == {"four_bit_base", "zero_stages"}


class TakenForCuda(Rig):
    """On the CPU, with the answers of a CUDA device put in its mouth."""

    cuda = True


@pytest.fixture
def pretended(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A rig on which the lines for CUDA run, as far as a CPU can take them."""
    for name in ("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fresh = TakenForCuda(CPU, rig.folder, tiny=True)
    vars(fresh).update({name: vars(rig)[name] for name in ("reference", "plain", "text")})
    return fresh


def test_a_plan_that_is_far_off_is_found_out(pretended: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = gpu_memory.footprint_of(pretended.config(), pretended.shape.vocabulary, "cpu").at(8, 1).tensors
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: planned)
    assert KNOWN["predicted_memory"].found(pretended).verdict == "pass"
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: planned // 4)
    found = KNOWN["predicted_memory"].found(pretended)
    assert found.verdict == "fail" and len(found.figures) == len(gpu_memory.WAYS)


def test_tf32_that_is_not_used_is_found_out(pretended: Rig) -> None:
    found = KNOWN["tf32_losses"].found(pretended)
    assert (found.verdict, found.reason) == ("fail", "the same: TF32 was used")


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_a_wait_in_the_loop_is_found_out(pretended: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch warns of one; on a GPU the next test lets the loop really wait."""
    assert KNOWN["quiet_steps"].found(pretended).verdict == "pass"
    normalise = TorchEngine.normalise

    def warns(self: TorchEngine, total: Tensor, step_targets: int) -> Tensor:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return normalise(self, total, step_targets)

    monkeypatch.setattr(TorchEngine, "normalise", warns)
    again = TakenForCuda(CPU, pretended.folder / "again", tiny=True)
    again.folder.mkdir()
    found = KNOWN["quiet_steps"].found(again)
    assert found.verdict == "fail" and f"{Path(__file__).name}:" in found.reason


@pytest.mark.gpu
def test_a_loop_that_waits_for_the_gpu_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    normalise = TorchEngine.normalise

    def waits(self: TorchEngine, total: Tensor, step_targets: int) -> Tensor:
        total.item()
        return normalise(self, total, step_targets)

    rig = Rig(torch.device("cuda", 0), tmp_path, tiny=True)
    assert KNOWN["quiet_steps"].found(rig).verdict == "pass"
    monkeypatch.setattr(TorchEngine, "normalise", waits)
    again = Rig(rig.device, tmp_path / "again", tiny=True)
    again.folder.mkdir()
    assert "the host waited at" in KNOWN["quiet_steps"].found(again).reason
    assert KNOWN["nonfinite_update"].found(rig).verdict == "fail"
