"""`tune --dry-run`: what a sweep would do, without a Ray of its own and without leaving anything behind."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from orchestrator.console import count, duration, out, pairs, print_json
from orchestrator.experiment import cache_dir
from orchestrator.memory_limit import limit_for
from orchestrator.ray_cluster import usable_cpus
from orchestrator.sweeps.memory import MARGIN, Allowed, Footprints, is_ample, take_out, unlooked
from orchestrator.sweeps.searchers import trials_to_train
from orchestrator.sweeps.settings import SweepSettings, build_settings
from orchestrator.sweeps.slots import Slots, asked_cluster, slots_of
from orchestrator.sweeps.sweep import Sweep, SweepRequest, check_batches, notes_of, settle_name, sweep_fields
from orchestrator.sweeps.trials import in_tokens
from search_spaces.precisions import Device
from search_spaces.space import Space
from trainers.config import RunConfig
from trainers.data.prepare import data_hashes
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
    check_batches(base, space, [phase.train_tokens for phase in report.survey.phases])
    tokens = [phase.tokens for phase in report.plan.phases]
    settings = build_settings(draft, space.to_json(), sum(tokens))
    counted = in_tokens(base, tokens)
    refuse_name(request, counted, settings)
    sweep = Sweep("", request.runs_dir, request.runs_dir, base, settings, space, {}, (), device)
    slots = slots_there(sweep, request)
    per_second = measured_speed(base, report.survey.vocab_size, settings.cpus_per_trial) if device == "cpu" else None
    left = within_memory(base, space, report.survey.vocab_size, device, slots.count, request)
    space, taken_out = left.space, (*taken_out, *left.taken_out)
    notes = [*notes_of(counted, settings, space), *filter(None, [unlooked(request.memory_limit)])]
    settings = settings.model_copy(update={"trials": trials_to_train(settings, space)})
    at_a_time = min(slots.count, settings.trials)
    speed = None if per_second is None else per_second * at_a_time
    bounds = bounds_of(settings, request, slots.gpus_per_trial * at_a_time, speed)
    facts = {
        "space": {path: space[path].describe() for path in space},
        "taken_out": [list(cell) for cell in taken_out],
        "trials": settings.trials,
        "seeds": settings.seeds,
        "tokens_per_training": settings.tokens,
        "tokens_at_most": bounds.tokens_at_most,
        "tokens_expected": bounds.tokens_expected,
        "trials_at_a_time": at_a_time,
        "tokens_per_s_of_a_trial": per_second,
        "seconds_expected": bounds.seconds_expected,
        "seconds_at_most": bounds.seconds_at_most,
        "bounded_by": bounds.by,
        "notes": notes,
    }
    if request.json:
        print_json(facts)
    else:
        _print(base, settings, facts)
    return DONE


def refuse_name(request: SweepRequest, base: RunConfig, settings: SweepSettings) -> None:
    """UserError where --name is another sweep's, or a run's. `base`: budgets in tokens."""
    if request.name is None or request.fresh or not (request.runs_dir / request.name).exists():
        return
    hashes = data_hashes(base)  # remembers nothing: a rehearsal leaves nothing behind
    settle_name(request, base.preset, settings, sweep_fields(base, settings, hashes))


def within_memory(
    base: RunConfig, space: Space, vocab_size: int, device: Device, slots: int, request: SweepRequest
) -> Allowed:
    """What is left of the space on this machine, by prediction, or within what was asked for. Raises UserError where
    nothing is."""
    if unlooked(request.memory_limit):
        return Allowed(space)
    share = min(1.0, request.gpus_per_trial or 1.0)
    limit = limit_for(device, request.memory_limit, slots * base.workers, share)
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
    if facts["bounded_by"]:
        rows.append(("", f"bounded by {facts['bounded_by']}: without it at most {count(whole_of(settings))} in all"))
    if facts["seconds_expected"] is not None:
        expected, most = duration(facts["seconds_expected"]), duration(facts["seconds_at_most"])
        speed = f"{count(round(facts['tokens_per_s_of_a_trial']))} tokens/s, measured on {MEASURED_STEPS} steps here"
        rows.append(("time", f"about {expected}, at most {most} ({speed}; evaluations and start-up come on top)"))
    elif facts["seconds_at_most"] is not None:
        rows.append(("time", f"at most {duration(facts['seconds_at_most'])}; an estimate would need the GPU"))
    else:
        rows.append(("time", "not estimated: it would need the GPU"))
    rows += [("note", note) for note in facts["notes"]]
    console.print(pairs(rows))


def expected_tokens(settings: SweepSettings) -> int:
    """Tokens over all trials when, at each rung, all but one of `reduction` stop (asha); all of them otherwise."""
    whole = whole_of(settings)
    if settings.scheduler != "asha":
        return whole
    rung, share, before, total = float(settings.grace or settings.report_every), 1.0, 0.0, 0.0
    while rung < settings.tokens:
        total += share * (rung - before)
        before, share, rung = rung, share / settings.reduction, rung * settings.reduction
    total += share * (settings.tokens - before)
    return math.ceil(total * settings.trials * settings.seeds)


@dataclass(frozen=True)
class Bounds:
    """What the sweep takes, with the budgets of the whole: --max-tokens, --max-time and --max-gpu-hours."""

    tokens_at_most: int
    tokens_expected: int
    seconds_at_most: float | None
    seconds_expected: float | None
    by: str | None
    """the budget that ends it before every trial is done, where that can be told"""


def bounds_of(settings: SweepSettings, request: SweepRequest, gpus: float, speed: float | None) -> Bounds:
    """`gpus`: held at a time; `speed`: tokens/s of all trials at a time, None where nobody knows."""
    hours = request.max_gpu_hours
    times = {"--max-time": request.max_seconds, "--max-gpu-hours": hours * 3600 / gpus if hours and gpus else None}
    seconds = {name: limit for name, limit in times.items() if limit is not None}
    tokens = {"--max-tokens": request.max_tokens} if request.max_tokens is not None else {}
    if speed is not None:
        tokens |= {name: int(limit * speed) for name, limit in seconds.items()}
    whole, expected = whole_of(settings), expected_tokens(settings)
    tightest = min(tokens, key=lambda name: tokens[name], default=None)
    by = tightest if tightest is not None and tokens[tightest] < whole else None
    most = min([whole, *tokens.values()])
    expected = min(expected, most)
    if speed is None:
        return Bounds(most, expected, min(seconds.values(), default=None), None, by)
    return Bounds(most, expected, most / speed, expected / speed, by)


def whole_of(settings: SweepSettings) -> int:
    """Tokens of the sweep where nothing is stopped."""
    return settings.trials * settings.seeds * settings.tokens


def slots_there(sweep: Sweep, request: SweepRequest) -> Slots:
    """How many trials train at a time where they would: on the cluster that RAY_ADDRESS names, or on this machine.

    Raises UserError where a trial could never be placed, or the cluster cannot be asked.
    """
    if os.environ.get("RAY_ADDRESS"):
        with asked_cluster(sweep.base.workers) as ray:
            return slots_of(ray, sweep, request)
    return slots_of(this_machine(sweep, request), sweep, request)


def this_machine(sweep: Sweep, request: SweepRequest) -> Any:
    """What a Ray of this machine alone would say of it (`orchestrator.ray_cluster`), without being started."""
    there: dict[str, float] = {"CPU": max(sweep.base.workers, usable_cpus())}
    if sweep.device == "cuda" or request.gpus_per_trial:
        import torch

        there["GPU"] = torch.cuda.device_count()
    return SimpleNamespace(
        cluster_resources=lambda: there,
        nodes=lambda: [{"NodeID": "here", "Alive": True, "Resources": there}],
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "here"),
    )


def measured_speed(base: RunConfig, vocab_size: int, threads: int) -> float:
    """Tokens/s of a trial: forward and backward of its workers on random tokens at the base batch, the median of a few
    steps of one of them."""
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
    return base.workers * rows * base.sequence_length / sorted(seconds[1:])[MEASURED_STEPS // 2]
