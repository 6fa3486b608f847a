"""How many updates were left out because the loss or a gradient was not finite."""

from __future__ import annotations

import torch
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
