"""P1: a step of our loop against a step of the bare one, in one process, losses equal bit for bit."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.bare_loop import BareLoop
from benchmarks.measure import Cost, Figure, Ratio, noise_of, ratio, report, rounds, timed
from benchmarks.workload import BareJob, OurLoop, our_loop, scratch, small_as_shipped, two_million
from trainers.config import RunConfig

BAR = 1.02


@dataclass(frozen=True)
class Peer:
    """One comparison of the report."""

    name: str
    build: Callable[[int], RunConfig]
    """the configuration of so many steps"""
    block: int
    """steps between two looks at the clock: some seconds of both sides, and every logged step's share"""
    pairs: float = 1.0
    """of those asked for"""
    seeded: bool = True
    """the bare loop seeds the dropout masks of each step as ours does, without which losses cannot be compared"""
    bar: float | None = None


PEERS = (
    Peer("2 M parameters", two_million, block=10, bar=BAR),
    Peer("fundamentallm/small", small_as_shipped, block=20, pairs=2.5),
    Peer("fundamentallm/small, peer unseeded", small_as_shipped, block=20, pairs=2.5, seeded=False),
)


@dataclass(frozen=True)
class Comparison:
    """What the blocks of every loop took, and whether they computed the same."""

    costs: dict[str, list[Cost]]
    block: int
    equal_losses: int
    """logged losses that are the same bits on both sides"""
    losses: int
    equal_weights: bool

    def ratio(self, ours: str, theirs: str, attribute: str = "seconds") -> Ratio:
        return ratio(*([getattr(cost, attribute) for cost in self.costs[side]] for side in (ours, theirs)))

    def median_step_ms(self, side: str) -> float:
        return float(np.median([cost.seconds for cost in self.costs[side]])) / self.block * 1e3


def compare(peer: Peer, *, pairs: int, warm_up: int) -> Comparison:
    """`pairs` rounds of a block of our loop, of the bare one and of the bare one again (the A/A control)."""
    total = (pairs + warm_up) * peer.block
    with scratch() as folder, our_loop(peer.build(total + 1), folder) as ours:
        job = BareJob.of(ours, total)
        bare, control = job.loop(ours.run.model), job.loop(ours.run.model)
        if not peer.seeded:
            bare.seeds = control.seeds = None
        sides = {
            "ours": functools.partial(timed, functools.partial(ours.steps, peer.block)),
            "bare": functools.partial(timed, functools.partial(_steps, bare, peer.block)),
            "control": functools.partial(timed, functools.partial(_steps, control, peer.block)),
        }
        rounds(sides, warm_up)
        costs = rounds(sides, pairs, what=peer.name)
        equal, count = _equal_losses(ours, bare)
        return Comparison(costs, peer.block, equal, count, _equal_weights(ours, bare))


def _steps(loop: BareLoop, count: int) -> None:
    for _ in range(count):
        loop.step()


def _equal_losses(ours: OurLoop, bare: BareLoop) -> tuple[int, int]:
    """Ours is recorded as sum / count in float64; the bare one is the float32 of the same quotient."""
    logged = [np.float32(value) for _, value in ours.logged("train/loss")]
    assert len(logged) == len(bare.losses), (len(logged), len(bare.losses))
    return sum(a == np.float32(b) for a, b in zip(logged, bare.losses, strict=True)), len(logged)


def _equal_weights(ours: OurLoop, bare: BareLoop) -> bool:
    both = zip(ours.run.model.parameters(), bare.model.parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in both)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pairs", type=int, default=24)
    options = parser.parse_args(arguments)
    pairs, warm_up = (1, 1) if options.quick else (options.pairs, 2)

    figures: list[Figure] = []
    samples = {}
    for peer in PEERS:
        name = peer.name
        found = compare(peer, pairs=round(pairs * peer.pairs), warm_up=warm_up)
        control = found.ratio("control", "bare")
        figures += [
            Figure.of(
                f"{name}: our step / bare step", found.ratio("ours", "bare"), bar=peer.bar, noise=noise_of(control)
            ),
            Figure.of(f"{name}: CPU seconds, ours / bare", found.ratio("ours", "bare", "cpu_seconds")),
            Figure.of(f"{name}: control, bare / bare", control),
            Figure(f"{name}: bare step", found.median_step_ms("bare"), "ms"),
        ]
        if peer.seeded:
            share = found.equal_losses / found.losses
            figures.append(Figure(f"{name}: losses equal bit for bit", share, "of all", bar=1.0, at_least=True))
            weights = float(found.equal_weights)
            figures.append(Figure(f"{name}: weights equal at the end", weights, "(1: yes)", bar=1, at_least=True))
        samples[name] = found.costs
    report(
        "step_overhead",
        figures,
        quick=options.quick,
        steps_a_block={peer.name: peer.block for peer in PEERS},
        samples=samples,
    )


if __name__ == "__main__":
    main()
