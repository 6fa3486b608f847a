"""The language-modelling loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.config import OptimConfig, PhaseConfig, RunConfig
from trainers.data.types import IGNORED, Batch
from trainers.objectives import build_objective
from trainers.objectives.language_model import LanguageModel


class Logits(nn.Module):
    """A model whose logits are its parameters."""

    def __init__(self, rows: int = 3, length: int = 5, vocabulary: int = 7) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(rows, length, vocabulary, generator=torch.Generator().manual_seed(1)))

    def forward(
        self, tokens: Tensor, state: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return self.logits, state


def batch(*, padded: bool) -> Batch:
    targets = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(2))
    if padded:
        targets[0, 3:] = IGNORED
        targets[2, 1:] = IGNORED
    return Batch(torch.zeros(3, 5, dtype=torch.int64), targets, int((targets != IGNORED).sum()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("padded", [False, True])
def test_the_sum_over_targets_is_torchs_mean_times_their_number(smoothing: float, padded: bool) -> None:
    model, data = Logits(), batch(padded=padded)
    got = LanguageModel(smoothing).loss(model, data, None).total / data.n_targets
    want = F.cross_entropy(model.logits.flatten(0, 1), data.targets.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    (unsmoothed,) = torch.autograd.grad(LanguageModel().loss(model, data, None).total, model.logits)
    (smoothed,) = torch.autograd.grad(LanguageModel(0.1).loss(model, data, None).total, model.logits)
    assert not torch.allclose(unsmoothed, smoothed)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_micro_batch_has_the_bits_of_the_mean(smoothing: float) -> None:
    ours, theirs, data = Logits(), Logits(), batch(padded=False)
    (LanguageModel(smoothing).loss(ours, data, None).total / data.n_targets).backward()
    F.cross_entropy(theirs.logits.flatten(0, 1), data.targets.flatten(), label_smoothing=smoothing).backward()
    if smoothing == 0.0:
        assert torch.equal(ours.logits.grad, theirs.logits.grad)  # type: ignore[arg-type]
    else:  # torch divides the smoothed part by the count in another place
        torch.testing.assert_close(ours.logits.grad, theirs.logits.grad, rtol=1e-5, atol=1e-8)


def test_padding_gets_no_gradient() -> None:
    model, data = Logits(), batch(padded=True)
    LanguageModel(0.1).loss(model, data, None).total.backward()
    grad = model.logits.grad
    assert grad is not None
    assert grad[data.targets == IGNORED].eq(0).all()
    assert grad[data.targets != IGNORED].ne(0).any(dim=-1).all()


def test_low_precision_logits_are_summed_in_fp32() -> None:
    model, data = Logits().to(torch.bfloat16), batch(padded=False)
    assert LanguageModel().loss(model, data, None).total.dtype == torch.float32
    assert LanguageModel().loss(model.double(), data, None).total.dtype == torch.float64


def test_metrics_only_when_asked() -> None:
    model, data = Logits(), batch(padded=True)
    assert LanguageModel().loss(model, data, None).metrics == {}
    correct = LanguageModel().loss(model, data, None, with_metrics=True).metrics["correct"]
    assert int(correct) == int(((model.logits.argmax(-1) == data.targets) & (data.targets != IGNORED)).sum())


def test_scores_are_each_targets_own_and_free_of_smoothing() -> None:
    model, data = Logits(), batch(padded=True)
    scores = LanguageModel(0.3).scores(model, data, None)
    assert scores.nll.sum().item() == pytest.approx(LanguageModel().loss(model, data, None).total.item(), rel=1e-6)
    assert scores.nll[data.targets == IGNORED].eq(0).all() and not scores.correct[data.targets == IGNORED].any()
    assert not scores.nll.requires_grad


def test_state_passes_through() -> None:
    state = {"memory": torch.ones(3, 2)}
    assert LanguageModel().loss(Logits(), batch(padded=False), state).state is state


def test_a_phase_has_its_own_smoothing() -> None:
    config = RunConfig(phases=(PhaseConfig(name="a"), PhaseConfig(name="b", optim=OptimConfig(label_smoothing=0.2))))
    a, b = config.resolved_phases()
    assert (build_objective(config, a), build_objective(config, b)) == (LanguageModel(0.0), LanguageModel(0.2))
