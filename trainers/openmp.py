"""How torch's threads wait for each other."""

from __future__ import annotations

import os

SPIN_COUNT = "20000"


def spin_briefly() -> None:
    """Let an idle OpenMP thread give its core up soon; call before torch is imported, a user's own value wins.

    libgomp spins for milliseconds by default. Where other processes want the cores too (Ray's own do), the thread that
    has work then waits for the one that spins: a step of a small model that takes 18 ms alone was seen to take 150 to
    270 ms. With 20,000 turns it takes 16 ms alone (2 cores, torch 2.13), so nothing is lost by it.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
