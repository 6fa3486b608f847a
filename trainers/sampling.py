"""How the next token is chosen from a model's scores: pure functions on one vector of logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.errors import UserError

LEAST_TEMPERATURE = 1e-4  # far below, scores divided by it are no longer finite in float32
MOST_PENALTY = 1000.0


@dataclass(frozen=True)
class GenerateConfig:
    """What to write. All four ways of shaping the distribution combine. UserError where a value breaks a rule."""

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    """only the k best tokens; 1 is greedy"""
    top_p: float | None = None
    """only the best tokens that together have this probability, the one that crosses it included"""
    repetition_penalty: float = 1.0
    """above 1 makes tokens that already stand in the text less likely"""
    stop: tuple[str, ...] = ()
    """ends the text before the first of these; they may lie across tokens"""
    seed: int = 42

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {self.max_tokens}.")
        if not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"temperature must be above 0 (at least {LEAST_TEMPERATURE:g}), not {self.temperature}. "
                "For greedy text use top_k=1."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k}. Leave it out to allow every token.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p must be above 0 and at most 1, not {self.top_p}. Leave it out to allow every token."
            )
        if not 1 / MOST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            raise UserError(
                f"repetition_penalty must be between {1 / MOST_PENALTY:g} and {MOST_PENALTY:g} (1 is off), "
                f"not {self.repetition_penalty}."
            )
        if not isinstance(self.stop, tuple) or not all(self.stop):
            raise UserError(f"stop must be a tuple of texts, none of them empty; got {self.stop!r}.")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits (V,) with those of seen tokens, bool (V,), divided by the penalty where positive, else multiplied.

    CTRL, Keskar et al. 2019, arXiv:1909.05858, section 4.1, for scores of either sign.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """logits (V,) with all but the k largest at -inf: exactly k, of equals the lower index."""
    if k >= logits.numel():
        return logits
    return _keep(logits, _best_first(logits)[:k])


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """logits (V,) with all at -inf but the shortest best-first prefix whose probability reaches p.

    The token that crosses p is kept (Holtzman et al., arXiv:1904.09751), so at least one always is.
    """
    if p >= 1:
        return logits
    order = _best_first(logits)
    reached = torch.softmax(logits[order].double(), dim=0).cumsum(0)
    return _keep(logits, order[: int((reached < p).sum()) + 1])


def choose(logits: Tensor, seen: Tensor, config: GenerateConfig, generator: torch.Generator) -> int:
    """The next token id from float32 logits (V,) on the CPU.

    Order: repetition penalty, temperature, top-k, top-p (on what top-k left), then one draw. Under top_k=1 nothing is
    drawn. UserError where the scores are not finite numbers.
    """
    if bool(torch.isnan(logits).any() | torch.isposinf(logits).any()):
        raise UserError("the model's scores are not finite: its training diverged. Use an earlier checkpoint.")
    if config.repetition_penalty != 1:
        logits = penalise_repetition(logits, seen, config.repetition_penalty)
    if config.top_k == 1:
        return int(logits.argmax())
    logits = logits / config.temperature
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None:
        logits = keep_top_p(logits, config.top_p)
    return int(torch.multinomial(torch.softmax(logits, dim=0), 1, generator=generator))


def _best_first(logits: Tensor) -> Tensor:
    # stable: of equal scores the lower index comes first, as in argmax
    return torch.sort(logits, descending=True, stable=True).indices


def _keep(logits: Tensor, kept: Tensor) -> Tensor:
    out = torch.full_like(logits, -math.inf)
    out[kept] = logits[kept]
    return out
