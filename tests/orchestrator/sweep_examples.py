"""Sweeps as the store would have them, made of a formula: for the figures and the report."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from orchestrator.sweeps.history import PENALTY
from orchestrator.sweeps.results import PointResult, SweepResults, TrialResult
from orchestrator.sweeps.settings import Objective

TOKENS, EVERY = 900_000, 100_000
RATES, BATCHES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (8, 16, 32)


def example(count: int = 30, *, seeds: int = 1, precisions: Sequence[str] = ("fp32", "bf16")) -> SweepResults:
    """`count` random points of learning rate, batch and precision; most of the bad ones stopped at a rung."""
    rng = random.Random(0)
    points = []
    for number in range(count):
        rate = math.exp(rng.uniform(math.log(1e-4), math.log(3e-2)))
        params = {"optim.lr": rate, "batch.sequences": rng.choice(BATCHES), "precision": rng.choice(precisions)}
        points.append(point(number, params, seeds=seeds, rng=rng))
    return sweep(points)


def point(
    number: int, params: dict, *, seeds: int = 1, rng: random.Random | None = None, state: str = ""
) -> PointResult:
    """A point whose loss has its least at a learning rate that grows with the batch; it diverges beyond 0.02."""
    rng = rng or random.Random(number)
    rate, batch = params.get("optim.lr", 1e-3), params.get("batch.sequences", 16)
    miss = abs(math.log10(rate) - math.log10(2e-3 * math.sqrt(batch / 16)))
    if not state:
        state = "nonfinite" if rate > 2e-2 else "asha" if miss > 0.5 and rng.random() < 0.7 else "completed"
    rung = {"asha": rng.choice((1, 3)), "running": 4, "nonfinite": 1}.get(state, 9) * EVERY
    return PointResult(number, tuple(_trial(number, i, params, state, miss, rung, rng, seeds) for i in range(seeds)))


def _trial(
    number: int, index: int, params: dict, state: str, miss: float, rung: int, rng: random.Random, seeds: int
) -> TrialResult:
    noise = rng.gauss(0, 0.015)
    precision, batch = str(params.get("precision", "fp32")), params.get("batch.sequences", 16)
    full = precision == "fp32"
    evaluations = range(EVERY, rung + 1, EVERY)
    curve = tuple((at, 1.6 + 0.6 * miss**2 + 4 * (at / EVERY + 1) ** -1.4 + noise) for at in evaluations)
    told = {"nonfinite": (PENALTY,), "running": ()}.get(state, (curve[-1][1],))
    return TrialResult(
        name=f"t{number:04d}" + (f"-s{index}" if seeds > 1 else ""), point=number, seed_index=index, state=state,
        params=params, config={"optim.lr": str(params.get("optim.lr", 1e-3)), "batch.sequences": str(batch)},
        objectives=told, curve=curve, tokens=rung,
        tokens_per_s=(9000 if full else 14000) * (1 + 0.1 * math.log2(batch / 8)) + rng.gauss(0, 300),
        peak_gib=(0.5 if full else 0.33) + 0.01 * batch, train_s=rung / 9000, precision=precision,
        end_s=None if state == "running" else 1_700_000_000.0 + 10 * number + rng.uniform(0, 30),
        run_id=f"{number:032x}", run_path=f"/runs/example/t{number:04d}",
    )  # fmt: skip


def sweep(points: list[PointResult], **more: object) -> SweepResults:
    trains = sum(point.train_s for point in points)
    arguments: dict = {
        "name": "example", "state": "finished", "points": tuple(points), "objectives": (Objective(),), "slots": 2,
        "settings": {"searcher": "tpe", "scheduler": "asha", "seeds": len(points[0].trials) if points else 1},
        "preset": "fundamentallm/small", "train_s": trains, "wall_s": trains / 2 * 1.1,
        "tokens": sum(trial.tokens for point in points for trial in point.trials), "stop_reason": "completed",
        "taken_out": (("precision=fp16", "fp16 has no kernels on a CPU."),),
        "command": "orchestrate train fundamentallm/small optim.lr=0.002 batch.sequences=16",
    } | more  # fmt: skip
    return SweepResults(**arguments)
