"""GPUs by name: the memory that a card has, as its driver states it."""

from __future__ import annotations

import difflib
import re

from orchestrator.memory_limit import parse_size
from trainers.errors import UserError
from trainers.memory.calibration import card_key

MIB = 1 << 20
CARDS = {
    "t4": 15_360,
    "l4": 23_034,
    "v100-16": 16_384,
    "v100-32": 32_768,
    "rtx3060": 12_288,
    "rtx3090": 24_576,
    "rtx4080": 16_376,
    "rtx4090": 24_564,
    "rtx5090": 32_607,
    "a10": 23_028,
    "a6000": 49_140,
    "l40s": 46_068,
    "a100-40": 40_960,
    "a100-80": 81_920,
    "h100": 81_559,
    "h200": 143_771,
}
"""MiB in all; a display and other programs take their part of it"""


def gpu_memory(text: str) -> tuple[int, str]:
    """Bytes of one GPU and what that is, of '24GiB' or the name of a card. Raises UserError."""
    name = card_key(text)
    if name in CARDS:
        return CARDS[name] * MIB, name
    if re.match(r"\s*[\d.]", text):
        return parse_size(text, "--gpu-memory"), text.strip()
    close = difflib.get_close_matches(name, CARDS, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise UserError(f"--gpu-memory is an amount such as 24GiB or a card: {', '.join(CARDS)}; got {text!r}.{meant}")
