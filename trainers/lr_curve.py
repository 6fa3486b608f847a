"""LrCurve: what a learning-rate range test saw, and the rate to train with that it suggests. No torch.

The test is that of Smith (2017, arXiv:1506.01186, section 3.3) with a geometric sweep and the two marks that fastai
made customary: the point of steepest descent, and a tenth of the rate at the minimum of the smoothed loss.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from trainers.errors import ConfigError, TrainingFailed

DIVERGENCE = 4.0  # a loss above this many times the lowest smoothed one ends the test, as in fastai
FEWEST_POINTS = 8  # below, no curve to read anything from
MOST_POINTS = 100_000
LEAST_FALL = 0.01  # of the loss before the first update: a smaller fall is none
NOISE = 6.0  # a fall below so many standard errors of the smoothed loss is noise: its range over some 100 points

Ending = Literal["completed", "diverged", "nonfinite", "stopped"]


class NoSuggestion(TrainingFailed):
    """A curve from which no rate can be read: the message says why and what to change."""


def geometric(low: float, high: float, steps: int) -> tuple[float, ...]:
    """`steps` learning rates from `low` to `high`, each the same factor above the one before.

    Raises ConfigError where the bounds are not 0 < low < high, or the steps not FEWEST_POINTS to MOST_POINTS.
    """
    if not (math.isfinite(low) and math.isfinite(high) and 0 < low < high):
        raise ConfigError(
            f"a range test goes up from a small learning rate above 0 to a larger one, got --from {low:g} --to "
            f"{high:g}." + (f" Did you mean --from {high:g} --to {low:g}?" if 0 < high < low < math.inf else "")
        )
    if high / low == math.inf:
        raise ConfigError(
            f"from --from {low:g} to --to {high:g} is farther than numbers of 64 bits count: bring them nearer."
        )
    if steps > MOST_POINTS:
        raise ConfigError(f"--steps {steps}: a range test has at most {MOST_POINTS:,} steps; 100 to 1000 are good.")
    if steps < FEWEST_POINTS:
        raise ConfigError(
            f"--steps {steps}: a range test needs at least {FEWEST_POINTS} steps to show a curve; 100 or more are good."
        )
    return tuple(low * (high / low) ** (index / (steps - 1)) for index in range(steps))


def smoothing_window(steps: int) -> int:
    """Points, an odd number, that the smoothed loss of a test of `steps` steps is the mean of: about a twelfth."""
    return 2 * max(2, round(steps / 24)) + 1


@dataclass(frozen=True)
class LrCurve:
    """The losses of a sweep, all finite. `losses[i]` was met on the batch after the update at the rate `lrs[i]`."""

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    """nats per target, training mode"""
    first_loss: float
    """before any update; NaN where it was not finite"""
    window: int
    """points that the smoothed loss is the mean of"""
    ended: Ending
    ended_at: float | None = None
    """the rate after whose update the loss diverged or was not finite; None where it never was, or before the first"""
    why: str = ""
    """who asked for the stop, for `stopped`"""

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The mean of `window` losses around each point, of fewer towards the ends; it has no lag."""
        if not self.losses:
            return ()
        half, n = self.window // 2, len(self.losses)
        at = np.arange(n)
        reach = np.minimum(half, np.minimum(at, n - 1 - at))
        sums = np.concatenate([[0.0], np.cumsum(self.losses)])
        means = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
        return tuple(means.tolist())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "smoothed": list(self.smoothed)}


# ---- reading the curve ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LrSuggestion:
    """Rates read off a curve; every one lies below the rate at which the loss diverged."""

    steepest: float
    """where the smoothed loss falls fastest per factor of the rate, before its minimum"""
    minimum: float
    """where the smoothed loss is lowest: too large to train with"""
    minimum_tenth: float
    suggested: float
    """`steepest`: a tenth of the minimum, the more careful mark, was seen to train clearly slower (docs/finders.md)"""
    band: tuple[float, float]
    """rates worth a sweep: from a third of the smaller mark to three times the larger, and not above the minimum"""
    still_falling: bool
    """the lowest loss is at the end of the sweep, so the real minimum may lie beyond it"""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def suggest(curve: LrCurve) -> LrSuggestion:
    """The rates that `curve` speaks for. Raises NoSuggestion where it shows no descent."""
    n = len(curve.losses)
    if n < FEWEST_POINTS:
        raise NoSuggestion(_too_short(curve))
    smoothed = np.array(curve.smoothed)
    first = min(curve.window // 2, (n - 1) // 3)  # nearer to the ends the mean is of few points, and noisy
    lowest = first + int(smoothed[first : n - first].argmin())
    _require_descent(curve, smoothed, first, lowest)
    slopes = np.gradient(smoothed)[first : lowest + 1]  # the steps of ln(lr) are equal
    steepest, minimum = curve.lrs[first + int(slopes.argmin())], curve.lrs[lowest]
    marks = (steepest, minimum / 10)
    return LrSuggestion(
        steepest=steepest,
        minimum=minimum,
        minimum_tenth=minimum / 10,
        suggested=steepest,
        band=(min(marks) / 3, min(3 * max(marks), minimum)),
        still_falling=curve.ended == "completed" and lowest == n - 1 - first,
    )


def _too_short(curve: LrCurve) -> str:
    n = len(curve.losses)
    if curve.ended == "stopped":
        return f"the range test was stopped after {n} steps ({curve.why}): too few to read a learning rate from."
    if curve.ended == "completed":
        return f"{n} steps are too few to read a learning rate from: at least {FEWEST_POINTS}."
    if curve.ended_at is None:
        return (
            "the loss was not finite before the first update, whatever the learning rate. Look at the text, at "
            "precision.compute and at the weights the run starts from."
        )
    return (
        f"{_broke(curve)} at lr {curve.ended_at:.2g}, after {n} usable steps, before there was a curve to read: "
        f"begin lower (--from {_lower(curve)})."
    )


def _require_descent(curve: LrCurve, smoothed: np.ndarray, first: int, lowest: int) -> None:
    fall = float(smoothed[first : lowest + 1].max() - smoothed[lowest])
    wavering = (np.array(curve.losses) - smoothed)[first : lowest + 1]
    noise = float(np.std(wavering)) / math.sqrt(curve.window)
    if fall > max(LEAST_FALL * abs(curve.first_loss), NOISE * noise):
        return
    seen = f"the loss did not fall between lr {curve.lrs[0]:.2g} and {curve.lrs[-1]:.2g}"
    if curve.ended_at is None:
        raise NoSuggestion(f"{seen}, more than it wavers: {curve.losses[-1]:.4g} at the end. Raise --to or --steps.")
    raise NoSuggestion(f"{seen}, and {_broke(curve)} at {curve.ended_at:.2g}: begin lower (--from {_lower(curve)}).")


def _broke(curve: LrCurve) -> str:
    return "the loss diverged" if curve.ended == "diverged" else "the loss or a gradient was not finite"


def _lower(curve: LrCurve) -> str:
    """A rate to begin with instead."""
    assert curve.ended_at is not None
    return f"{min([curve.ended_at, *curve.lrs[:1]]) / 1e4:.0e}".replace("e-0", "e-")
