"""`orchestrate plan` and `train --dry-run`: a plan from the configuration and a bounded look at the text.

Starts no Ray, trains no tokenizer and writes nothing. Refuses what training would refuse.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.console import count, duration, pairs, size
from orchestrator.experiment import cache_dir
from orchestrator.memory_plan import MemoryPlan, MemoryQuestion, PlannedCell, explained, plan_memory
from orchestrator.memory_tables import cells_table, components_table, memory_notes
from orchestrator.plan import (
    RunPlan,
    derive_plan,
    state_sizes,
    steps_per_epoch,
    warmups_beyond_epochs,
)
from orchestrator.runs import check_runs_dir, nearest_folder
from search_spaces.precisions import precision_of
from trainers.config import BudgetConfig, RunConfig, ScheduleConfig

if TYPE_CHECKING:
    from trainers.data.survey import DataSurvey, PhaseSurvey


@dataclass(frozen=True)
class PlanReport:
    """Everything the plan shows."""

    config: RunConfig
    survey: DataSurvey
    parameters: int
    plan: RunPlan | None
    """None where a budget in epochs waits for the length of a dataset that is not downloaded yet"""
    device: str
    free_bytes: int
    training_bytes: int
    """weights, gradients and optimizer state of one worker, without activations"""
    memory: MemoryPlan | None
    """None: it was not asked for"""

    @property
    def configured(self) -> PlannedCell | None:
        """The memory of the run as it is configured."""
        return self.memory.cells[0] if self.memory else None

    @property
    def seconds(self) -> float | None:
        """Of all its steps, where this kind of run has been measured on the device."""
        speed = self.configured.tokens_per_s if self.configured else None
        return self.plan.total_tokens / speed if self.plan and speed else None


def survey_plan(config: RunConfig, runs_dir: Path, question: MemoryQuestion | None = None) -> PlanReport:
    """The plan of a run, from a look at its data; with a `question`, its memory too.

    Raises UserError for whatever training would refuse here; of a question about GPUs that are elsewhere, there.
    """
    check_runs_dir(runs_dir)
    from trainers.data.prepare import survey
    from trainers.devices import check_machine, resolve_device
    from trainers.initial import initial_hash
    from trainers.memory.structure import read_structure

    asked = question or MemoryQuestion()
    config = asked.applied(config)
    if not asked.elsewhere:
        check_machine(config, resolve_device(config.device))
    initial_hash(config)
    found = survey(config)
    structure = read_structure(config.model, found.vocab_size)
    room = asked.room(config, cache_dir(runs_dir)) if question is not None else None
    lengths = [steps_per_epoch(config, phase.train_tokens) for phase in found.phases]
    waits = any(length is None and _waits_for_download(config, index) for index, length in enumerate(lengths))
    sizes = [state_sizes(structure, config, phase.optim) for phase in config.resolved_phases()]
    plan = derive_plan(config, parameters=structure.values, steps_per_epoch=lengths, sizes=sizes) if not waits else None
    return PlanReport(
        config=config,
        survey=found,
        parameters=structure.values,
        plan=plan,
        device=room.what if room and asked.elsewhere else str(resolve_device(config.device)),
        free_bytes=shutil.disk_usage(nearest_folder(runs_dir)).free,
        training_bytes=max(each.training_bytes for each in sizes),
        memory=None
        if room is None
        else plan_memory(config, found.vocab_size, room, batches=asked.batches, variants=asked.variants),
    )


def _waits_for_download(config: RunConfig, index: int) -> bool:
    """Whether a phase counts epochs of a dataset that is read whole once it is there."""
    phase = config.resolved_phases()[index]
    return phase.budget.epochs is not None and not any(source.streaming for source in phase.data.sources)


# ---- on the screen ----------------------------------------------------------------------------------------


def plan_json(report: PlanReport) -> dict[str, Any]:
    """The plan for programs."""
    return {
        "config": report.config.model_dump(mode="json"),
        "device": report.device,
        "vocab_size": report.survey.vocab_size,
        "exact": report.survey.exact,
        "parameters": report.parameters,
        "plan": report.plan.to_json() if report.plan else None,
        "data": [asdict(phase) for phase in report.survey.phases],
        "training_bytes": report.training_bytes,
        "free_bytes": report.free_bytes,
        "memory": report.memory.to_json() if report.memory else None,
        "seconds": report.seconds,
        "notes": list(_notes(report)),
    }


def plan_tables(report: PlanReport) -> list[RenderableType]:
    """What to print, part by part."""
    parts: list[RenderableType] = [pairs(list(_model_rows(report))), Text()]
    parts += [_phases_table(report), Text(), pairs(list(_saving_rows(report)))]
    if report.memory:
        parts += [Text(), components_table(report.memory)]
        if len(report.memory.cells) > 1:
            parts += [Text(), cells_table(report.memory)]
    notes = list(_notes(report))
    if notes:
        parts += [Text(), *(Text(f"- {note}") for note in notes)]
    return parts


def _model_rows(report: PlanReport) -> Iterator[tuple[str, RenderableType]]:
    config, model = report.config, report.config.model
    yield "preset", config.preset
    shape = f"{model.n_layers} layers of {model.d_model}, {model.n_heads} heads, context {count(model.context_length)}"
    yield "model", f"{count(report.parameters)} parameters: {shape}"
    parts = [model.norm, f"{model.norm_position}-norm", model.positions, model.activation, f"dropout {model.dropout:g}"]
    yield "", ", ".join(parts)
    yield "tokenizer", f"{config.tokenizer.kind}, {count(report.survey.vocab_size)} tokens of vocabulary"
    for index, source in enumerate(dict.fromkeys(s for phase in report.survey.phases for s in phase.sources)):
        stored = "size unknown" if source.size_bytes is None else size(source.size_bytes)
        yield "text" if index == 0 else "", f"{source.corpus} ({stored})"
    rows = f"{count(config.sequences_per_step)} rows of {count(config.sequence_length)} tokens"
    cut = f"{count(config.micro_sequences)} rows at a time"
    accumulated = f", {config.accumulation} micro-batches of {cut}" if config.accumulation > 1 else ""
    yield "step", f"{rows} = {count(config.tokens_per_step)} tokens{accumulated}"
    optim = config.optim
    yield "optimizer", f"{optim.name}, lr {optim.lr:g}, {_schedule(config.schedule)}"
    workers = f"{config.workers} worker{'s' if config.workers > 1 else ''}"
    yield "compute", f"{workers} on {report.device}, {precision_of(config)}, seed {config.seed}"


def _schedule(schedule: ScheduleConfig) -> str:
    warmup = f" after {count(schedule.warmup_steps)} steps of warm-up" if schedule.warmup_steps else ""
    return f"{schedule.kind}{warmup}"


def _phases_table(report: PlanReport) -> Table:
    about = "" if report.survey.exact else "~"
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("phase", no_wrap=True)
    for heading in ("text tokens", "steps/epoch", "epochs", "steps", "tokens seen", "held out"):
        table.add_column(heading, justify="right", no_wrap=True)
    specs = report.config.resolved_phases()
    for index, (spec, text) in enumerate(zip(specs, report.survey.phases, strict=True)):
        planned = report.plan.phases[index] if report.plan else None
        table.add_row(
            spec.name,
            _known(text.total_train_tokens, about),
            _known(planned.steps_per_epoch if planned else None, about),
            "?" if planned is None or planned.epochs is None else f"{planned.epochs:.2f}",
            _known(planned.steps, "" if spec.budget.steps else about) if planned else f"? ({_budget(spec.budget)})",
            _known(planned.tokens, "" if spec.budget.epochs is None else about) if planned else "?",
            _scored(text, report, about),
        )
    if report.plan and len(specs) > 1:
        table.add_row("in all", "", "", "", count(report.plan.total_steps), count(report.plan.total_tokens), "")
    return table


def _scored(text: PhaseSurvey, report: PlanReport, about: str) -> str:
    """Validation tokens that each evaluation scores."""
    limit = report.config.evaluation.max_tokens
    if text.held_out_tokens is None or limit is None or limit >= text.held_out_tokens:
        return _known(text.held_out_tokens, about)
    return count(limit)


def _known(number: int | None, about: str) -> str:
    return "?" if number is None else f"{about}{count(number)}"


def _budget(budget: BudgetConfig) -> str:
    return ", ".join(f"{value:g} {name}" for name, value in budget.model_dump().items() if value is not None)


def _saving_rows(report: PlanReport) -> Iterator[tuple[str, RenderableType]]:
    plan, saving = report.plan, report.config.checkpoint
    when = ["at the end of each phase"]
    when += [f"every {count(saving.every_steps)} steps"] if saving.every_steps else []
    when += [_epochs(saving.every_epochs)] if saving.every_epochs else []
    when += [f"every {saving.every_minutes:g} minutes"] if saving.every_minutes else []
    when += ["at each new best evaluation"] if saving.save_best else []
    if plan is not None:
        yield "evaluations", count(sum(phase.evaluations for phase in plan.phases))
        yield "checkpoints", f"{size(plan.checkpoint_bytes)} each, saved {', '.join(when)}"
        kept = f"{plan.kept_checkpoints} kept at most: {size(plan.kept_checkpoints * plan.checkpoint_bytes)}"
        yield "disk", f"{kept}; {size(plan.disk_bytes)} while one is written; {size(report.free_bytes)} free"
    state = f"{size(report.training_bytes)} for weights, gradients and optimizer in each worker"
    snapshot = f", {size(plan.snapshot_bytes)} for saving in the background" if plan else ""
    if report.configured is None:
        yield "memory", f"{state}{snapshot}; activations come on top"
    else:
        yield "memory", explained(report.configured)
    if report.seconds is not None and report.configured and report.configured.tokens_per_s:
        speed = f"{count(report.configured.tokens_per_s)} tokens/s, as measured on this device before"
        yield "time", f"about {duration(report.seconds)} ({speed})"


def _epochs(every: float) -> str:
    return "every epoch" if every == 1 else f"every {every:g} epochs"


def _notes(report: PlanReport) -> Iterator[str]:
    yield from report.survey.notes
    if report.memory:
        yield from memory_notes(report.memory)
    if report.plan is None:
        yield "the steps follow from the length of the Hub dataset, which is known once training has downloaded it."
    elif report.plan.disk_bytes > report.free_bytes:
        yield f"the disk has {size(report.free_bytes)} free, and the checkpoints need {size(report.plan.disk_bytes)}."
    if report.plan is not None:
        yield from warmups_beyond_epochs(report.config, report.plan.phases)
    if report.config.early_stopping.patience:
        rule = report.config.early_stopping
        yield f"early stopping may end a phase sooner: {rule.patience} evaluations without a better {rule.metric}."
