"""Which micro-batch sizes to try: doubling, then bisection, and never one that is foreseen not to fit. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from trainers.batch_probe import Probe
from trainers.memory.fit import Memory, largest_divisor

RESOLUTION = 16  # bisection ends within this part of the largest size that fits


def search(
    probe: Callable[[int], Probe], *, most: int, limit_bytes: int | None, share: int, foresee: bool
) -> list[Probe]:
    """Probes in rising order of their size: enough to know the largest that fits, to a sixteenth.

    Sizes double from 1 to `most` while they fit; bisection follows between the largest that fits and the smallest
    that does not. Last comes the largest divisor of `share`, the rows of a step, for it is one that can be used.

    Args:
        limit_bytes: what a peak is held against; None: the probes themselves know
        foresee: extend the line through the peaks before, and do not try what would pass the limit (where taking
            too much memory would harm others); such sizes come back as probes `not tried`
    """
    found: dict[int, Probe] = {}

    def fits(micro: int) -> bool:
        if micro not in found:
            expected = expected_peak(list(found.values()), micro) if foresee else None
            if expected is not None and limit_bytes is not None and expected > limit_bytes:
                found[micro] = not_tried(micro, expected, limit_bytes)
            else:
                found[micro] = probe(micro)
        return found[micro].fits

    largest, too_large = 0, None
    micro = 1
    while too_large is None and largest < most:
        if fits(micro):
            largest, micro = micro, min(2 * micro, most)
        else:
            too_large = micro
    while too_large is not None and too_large - largest > max(1, largest // RESOLUTION):
        between = (largest + too_large) // 2
        if fits(between):
            largest = between
        else:
            too_large = between
    if largest:
        fits(largest_divisor(share, largest))
    return [found[micro] for micro in sorted(found)]


def expected_peak(probes: Sequence[Probe], micro: int) -> int | None:
    """Bytes that a micro-batch of `micro` rows would take at most, by the sizes that ran; None where none did.

    Memory is a fixed part and one in proportion to the rows. Two sizes a factor of two apart give the line; one
    alone gives the part before the first step as fixed, which overestimates.
    """
    ran = sorted((one for one in probes if one.training_bytes is not None), key=lambda one: one.micro)
    if not ran:
        return None
    last, far = ran[-1], [one for one in ran if 2 * one.micro <= ran[-1].micro]
    assert last.training_bytes is not None and last.peak_bytes is not None and last.resting_bytes is not None
    if far:
        before = far[-1]
        assert before.training_bytes is not None
        slope = (last.training_bytes - before.training_bytes) / (last.micro - before.micro)
    else:
        slope = (last.training_bytes - last.resting_bytes) / last.micro
    return max(last.peak_bytes, int(last.training_bytes + max(0.0, slope) * (micro - last.micro)))


def not_tried(micro: int, expected: int, limit_bytes: int) -> Probe:
    """A size that was foreseen not to fit; `peak_bytes` is what was expected."""
    return Probe(micro, "not tried", "foreseen from the smaller sizes", peak_bytes=expected, limit_bytes=limit_bytes)


def measured_memory(probes: Sequence[Probe], limit_bytes: int) -> Memory:
    """What `fit` asks about: a size that was not tried, or did not fit, is too large."""
    peaks = {probe.micro: float(probe.peak_bytes or 0) for probe in probes if probe.fits}
    return Memory(limit_bytes, lambda rows, accumulation: peaks.get(rows, math.inf))
