"""`tune --dry-run`: what a sweep would do, without Ray and without leaving anything behind."""

from __future__ import annotations

import math
import os
import time
from typing import Any

from orchestrator.console import count, duration, out, pairs, print_json
from orchestrator.experiment import cache_dir
from orchestrator.memory_limit import limit_for
from orchestrator.sweeps.memory import MARGIN, Allowed, Footprints, is_ample, take_out
from orchestrator.sweeps.settings import SweepSettings, build_settings
from orchestrator.sweeps.sweep import SweepRequest
from search_spaces.precisions import Device
from search_spaces.space import Space
from trainers.config import RunConfig
from trainers.errors import UserError

DONE = 0
MEASURED_STEPS = 3


def rehearse(
    base: RunConfig,
    draft: dict[str, Any],
    space: Space,
    device: Device,
    request: SweepRequest,
    taken_out: tuple[tuple[str, str], ...] = (),
) -> int:
    """Print the number of trials, their tokens and an estimate of the time. Raises UserError as `tune` would."""
    from orchestrator.survey_plan import survey_plan

    report = survey_plan(base, request.runs_dir)
    if report.plan is None:
        raise UserError("how much a trial trains is known only once the text is downloaded: set budget.tokens.")
    tokens = sum(phase.tokens for phase in report.plan.phases)
    settings = build_settings(draft, space.to_json(), tokens)
    per_second = measured_speed(base, report.survey.vocab_size, settings.cpus_per_trial) if device == "cpu" else None
    slots = slots_here(base, settings, request)
    left = within_memory(base, space, report.survey.vocab_size, device, slots, request)
    space, taken_out = left.space, (*taken_out, *left.taken_out)
    most = settings.trials * settings.seeds * settings.tokens
    expected = expected_tokens(settings)
    facts = {
        "space": {path: space[path].describe() for path in space},
        "taken_out": [list(cell) for cell in taken_out],
        "trials": settings.trials,
        "seeds": settings.seeds,
        "tokens_per_training": settings.tokens,
        "tokens_at_most": most,
        "tokens_expected": expected,
        "trials_at_a_time": slots,
        "tokens_per_s_of_a_trial": per_second,
        "seconds_expected": expected / per_second / slots if per_second else None,
        "seconds_at_most": most / per_second / slots if per_second else None,
    }
    if request.json:
        print_json(facts)
    else:
        _print(base, settings, facts)
    return DONE


def within_memory(
    base: RunConfig, space: Space, vocab_size: int, device: Device, slots: int, request: SweepRequest
) -> Allowed:
    """What is left of the space on this machine, by prediction. Raises UserError where nothing is."""
    asked = None if request.memory_limit is None else f"{request.memory_limit}B"
    share = min(1.0, request.gpus_per_trial or 1.0)
    limit = limit_for(device, asked, slots * base.workers, share)
    if limit.bytes is None or is_ample(base, space, vocab_size, limit.bytes):
        return Allowed(space)
    footprints = Footprints(vocab_size, device, cache_dir(request.runs_dir))
    return take_out(base, space, round(MARGIN * limit.bytes), footprints)


def _print(base: RunConfig, settings: SweepSettings, facts: dict[str, Any]) -> None:
    console = out()
    rows = [("sweep", f"{base.preset} over {settings.space_name}, {settings.searcher} + {settings.scheduler}")]
    rows += [(f"  {path}", text) for path, text in facts["space"].items()]
    rows += [("  left out", f"{cell}: {reason}") for cell, reason in facts["taken_out"]]
    seeds = f" x {settings.seeds} seeds" if settings.seeds > 1 else ""
    rows += [
        ("trials", f"{settings.trials}{seeds}, {facts['trials_at_a_time']} at a time"),
        ("tokens", f"{count(settings.tokens)} a training, {count(facts['tokens_at_most'])} at most in all"),
    ]
    if facts["tokens_expected"] < facts["tokens_at_most"]:
        rows.append(("", f"about {count(facts['tokens_expected'])} where {settings.scheduler} stops as it should"))
    if facts["seconds_expected"] is not None:
        expected, most = duration(facts["seconds_expected"]), duration(facts["seconds_at_most"])
        speed = f"{count(round(facts['tokens_per_s_of_a_trial']))} tokens/s, measured on {MEASURED_STEPS} steps now"
        rows.append(("time", f"about {expected}, at most {most} ({speed}; evaluations and start-up come on top)"))
    else:
        rows.append(("time", "not estimated: it would need the GPU"))
    console.print(pairs(rows))


def expected_tokens(settings: SweepSettings) -> int:
    """Tokens over all trials when, at each rung, all but one of `reduction` stop (asha); all of them otherwise."""
    whole = settings.trials * settings.seeds * settings.tokens
    if settings.scheduler != "asha":
        return whole
    rung, share, before, total = float(settings.grace or settings.report_every), 1.0, 0.0, 0.0
    while rung < settings.tokens:
        total += share * (rung - before)
        before, share, rung = rung, share / settings.reduction, rung * settings.reduction
    total += share * (settings.tokens - before)
    return math.ceil(total * settings.trials * settings.seeds)


def slots_here(base: RunConfig, settings: SweepSettings, request: SweepRequest) -> int:
    """Trials at a time on this machine's CPUs."""
    from orchestrator.ray_cluster import usable_cpus

    fit = max(1, usable_cpus() // (settings.cpus_per_trial * base.workers))
    return min(fit, request.concurrent or fit, settings.trials)


def measured_speed(base: RunConfig, vocab_size: int, threads: int) -> float:
    """Tokens/s of forward and backward on random tokens at the base batch, the median of a few steps."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    import torch

    from trainers.models import build_model

    torch.set_num_threads(threads)
    model = build_model(base.model, base.model.vocab_size or vocab_size)
    rows = base.micro_sequences
    tokens = torch.randint(0, vocab_size, (rows, base.sequence_length))
    seconds = []
    for _ in range(MEASURED_STEPS + 1):
        began = time.perf_counter()
        logits, _ = model(tokens)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        seconds.append(time.perf_counter() - began)
    return rows * base.sequence_length / sorted(seconds[1:])[MEASURED_STEPS // 2]
