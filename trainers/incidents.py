"""Updates that were left out because the loss or a gradient was not finite: which of them count, and how many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

NAMES = ("total", "streak", "longest")


class HostIncidents:
    """Counters for devices whose results the host waits for anyway."""

    def __init__(self) -> None:
        self.total = 0
        self.streak = 0
        """skipped updates in a row, up to now"""
        self.longest = 0
        """longest streak since `take_longest`"""

    def record(self, skipped: bool | Tensor) -> None:
        if skipped:
            self.total += 1
            self.streak += 1
            self.longest = max(self.longest, self.streak)
        else:
            self.streak = 0

    def read(self) -> dict[str, int]:
        return {"total": self.total, "streak": self.streak, "longest": self.longest}

    def take_longest(self) -> int:
        """The longest streak alive since the last call."""
        longest, self.longest = self.longest, 0
        return longest

    def load(self, counts: dict[str, int]) -> None:
        self.total, self.streak, self.longest = (counts[name] for name in NAMES)


class DeviceIncidents:
    """The same counters kept on an accelerator: recording never waits, reading does."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.tensor(0, device=device)
        self.streak = torch.tensor(0, device=device)
        self.longest = torch.tensor(0, device=device)

    def record(self, skipped: bool | Tensor) -> None:
        self.total += skipped
        self.streak = (self.streak + 1) * skipped
        self.longest = torch.maximum(self.longest, self.streak)

    def read(self) -> dict[str, int]:
        counts = torch.stack((self.total, self.streak, self.longest)).tolist()
        return dict(zip(NAMES, counts, strict=True))

    def take_longest(self) -> int:
        longest = int(self.longest)
        self.longest.zero_()
        return longest

    def load(self, counts: dict[str, int]) -> None:
        for name in NAMES:
            getattr(self, name).fill_(counts[name])


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer update did."""

    grad_norm: Tensor
    """scalar on the device: the gradient's 2-norm over all ranks, before clipping"""
    skipped: bool | Tensor
    """the gradient was not finite and nothing changed; a bool where the host decided, else a scalar on the device"""


class Scaler(Protocol):
    """The loss scale of fp16, whoever keeps it."""

    def update(self, overflowed: Tensor, *, counted: Tensor) -> None: ...
    def check(self) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


class SkippedUpdates:
    """Whether an update that was left out is an incident or, under fp16, the scale that finds its place.

    Under fp16 an overflow under a finite loss is the scale's; an incident is a loss that was not finite on any rank.
    """

    def __init__(self, device: torch.device, scaler: Scaler | None, *, world_size: int, on_device: bool = False):
        self.scaler = scaler
        self.counts: HostIncidents | DeviceIncidents = DeviceIncidents(device) if on_device else HostIncidents()
        self._world_size = world_size
        self._bad_loss = torch.tensor(False, device=device)  # of any micro-batch since the last update; fp16 only

    def see(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch."""
        if self.scaler is not None:
            self._bad_loss = self._bad_loss | ~torch.isfinite(loss.detach())

    def count(self, skipped: Tensor) -> None:
        """Take in whether (bool scalar, the same on every rank) the update was left out. Under fp16 a collective."""
        if self.scaler is None:
            self.counts.record(skipped)
            return
        bad_loss, self._bad_loss = self._bad_loss, torch.zeros_like(self._bad_loss)
        if self._world_size > 1:  # the ranks' gradients are one sum, and so must be their verdict
            votes = bad_loss.to(torch.int32)
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
            bad_loss = votes.bool()
        self.counts.record(bad_loss)
        self.scaler.update(skipped & ~bad_loss, counted=~bad_loss)

    def should_check(self, update: Update, *, logging: bool = False) -> bool:
        """Whether to ask for incidents now: at once where the host decided, else on steps that log and wait anyway."""
        return logging if isinstance(update.skipped, Tensor) else update.skipped or logging

    def take_longest(self) -> int:
        """The longest row of incidents alive since this was last asked; may wait for the device.

        Raises TrainingFailed where fp16 loss scaling is at its end.
        """
        self._check_scale()
        return self.counts.take_longest()

    def total(self) -> int:
        """Incidents since the run began; may wait for the device. Raises as take_longest."""
        self._check_scale()
        return self.counts.read()["total"]

    def state(self) -> dict[str, Any]:
        """JSON; waits for the device."""
        return {"incidents": self.counts.read(), "scaler": self.scaler.state() if self.scaler else None}

    def load(self, state: Mapping[str, Any]) -> None:
        self.counts.load(state["incidents"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load(state["scaler"])

    def _check_scale(self) -> None:
        if self.scaler is not None:
            self.scaler.check()
