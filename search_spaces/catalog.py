"""Search spaces by name, each centred on the configuration it is asked for.

A catalogued space holds only what can start from scratch on the device; what was taken out is listed with its reason.
The first line of a function's docstring says what it searches.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from search_spaces.precisions import PRECISIONS, Device, refusal
from search_spaces.shapes import BAND, equal_shapes
from search_spaces.space import Axis, Choice, Float, Int, Space, When
from search_spaces.trial import PRECISION, SHAPE, phase_tokens, resolve
from trainers.config import RunConfig, ScheduleConfig
from trainers.errors import ConfigError
from trainers.presets import PRESETS

BATCH_FACTORS = (0.25, 0.5, 1, 2, 4)
"""batch sizes to try, as multiples of the configured one"""


@dataclass(frozen=True)
class TakenOut:
    """A cell that cannot start here."""

    cell: str
    """such as `precision=fp16`"""
    reason: str


@dataclass(frozen=True)
class CatalogSpace:
    """A space whose every point can start, and what was taken out of it for that."""

    space: Space
    taken_out: tuple[TakenOut, ...] = ()


def lr(config: RunConfig, device: Device) -> CatalogSpace:
    """The learning rate, a decade to either side of the configured one; of several phases, each rate of its own."""
    return CatalogSpace(Space(_lr(config)))


def lr_batch(config: RunConfig, device: Device) -> CatalogSpace:
    """The learning rate, and the batch from a quarter to four times the configured one."""
    batch, taken_out = _batch(config)
    return CatalogSpace(Space((*_lr(config), batch)), taken_out)


def lr_batch_precision(config: RunConfig, device: Device) -> CatalogSpace:
    """The learning rate, the batch, and every precision that can start from scratch on the device."""
    batch, taken_out = _batch(config)
    reasons = {name: refusal(name, config, device) for name in PRECISIONS}
    precision = Axis(PRECISION, Choice(tuple(name for name, reason in reasons.items() if reason is None)))
    impossible = tuple(TakenOut(f"{PRECISION}={name}", reason) for name, reason in reasons.items() if reason)
    return CatalogSpace(Space((*_lr(config), batch, precision)), taken_out + impossible)


def regularisation(config: RunConfig, device: Device) -> CatalogSpace:
    """Dropout, weight decay and label smoothing."""
    axes = [Axis(path, Float(0.0, _up_to(own, 0.3))) for path, own in _dropouts(config).items()]
    for section, optim in _sections(config, "optim"):
        axes += [
            Axis(f"{section}.weight_decay", _decades(optim.weight_decay) if optim.weight_decay else Float(0.0, 0.1)),
            Axis(f"{section}.label_smoothing", Float(0.0, _up_to(optim.label_smoothing, 0.2))),
        ]
    return CatalogSpace(Space(tuple(axes)))


def schedule(config: RunConfig, device: Device) -> CatalogSpace:
    """The schedule's kind, its warm-up, its lowest rate (where the kind has one) and the decaying part (under wsd)."""
    axes: list[Axis] = []
    for section, own in _sections(config, "schedule"):
        kinds = tuple(dict.fromkeys((own.kind, "constant", "linear", "cosine", "wsd")))
        falling = tuple(kind for kind in kinds if kind in ("linear", "cosine", "wsd", "step"))
        axes += [
            Axis(f"{section}.kind", Choice(kinds)),
            Axis(f"{section}.warmup_steps", Int(0, _longest_warmup(section, own, config))),
            Axis(f"{section}.min_lr_ratio", Float(0.0, max(0.2, own.min_lr_ratio)), When(f"{section}.kind", falling)),
            Axis(f"{section}.decay_fraction", Float(0.05, max(0.5, own.decay_fraction)),
                 When(f"{section}.kind", ("wsd",))),
        ]  # fmt: skip
    return CatalogSpace(Space(tuple(axes)))


def depth_width(config: RunConfig, device: Device) -> CatalogSpace:
    """Depth against width, the parameters of the blocks staying within 10% of the configured model's."""
    if config.init_from is not None:
        raise ConfigError(f"depth_width: the weights of {config.init_from} (init_from) fix the model's shape.")
    shapes = equal_shapes(config.model)
    if len(shapes) < 2:
        raise ConfigError(
            f"depth_width: no other depth of {config.model.n_layers}x{config.model.d_model} has a width that is a "
            f"multiple of its {config.model.n_heads} heads and keeps the blocks' parameters within {BAND:.0%}: search "
            f"model.n_layers or model.d_model with --set-space."
        )
    return CatalogSpace(Space((Axis(SHAPE, Choice(tuple(map(str, shapes)))),)))


def task_weights(config: RunConfig, device: Device) -> CatalogSpace:
    """The weights of a mixture from a quarter to four times the configured ones, the first source's staying."""
    axes = [
        Axis(f"{section}.sources.{index}.weight", Float(source.weight / 4, source.weight * 4, log=True))
        for section, data in _sections(config, "data")
        for index, source in enumerate(data.sources)
        if index and source.weight is not None
    ]
    if not axes:
        raise ConfigError(
            "task_weights: this configuration trains on no weighted mixture. Give data.sources two entries or more "
            "with a weight each; the weights are then searched."
        )
    return CatalogSpace(Space(tuple(axes)))


def phase_lengths(config: RunConfig, device: Device) -> CatalogSpace:
    """How the tokens of a run are shared among its phases, their sum staying equal."""
    if len(config.phases) < 2:
        raise ConfigError(
            "phase_lengths: this configuration has a single phase, whose length is the budget itself. It makes sense "
            "for several phases, such as those of fundamentallm/two-phase."
        )
    try:
        axes = _shares(config)
        highest = {axis.path: axis.domain.grid(2)[-1] for axis in axes}
        for tightest in (highest, *(highest | {axis.path: axis.domain.grid(2)[0]} for axis in axes)):
            resolve(tightest, config)  # refuses a share of less than a step
    except ConfigError as error:
        raise ConfigError(f"phase_lengths: {error}") from None
    return CatalogSpace(Space(axes))


CATALOG: dict[str, Callable[[RunConfig, Device], CatalogSpace]] = {
    "lr": lr,
    "lr_batch": lr_batch,
    "lr_batch_precision": lr_batch_precision,
    "regularisation": regularisation,
    "schedule": schedule,
    "depth_width": depth_width,
    "task_weights": task_weights,
    "phase_lengths": phase_lengths,
}


def catalogued(name: str, config: RunConfig, device: Device) -> CatalogSpace:
    """The space called `name` around `config`. ConfigError: no such space, or why this configuration cannot take it."""
    if name not in CATALOG:
        close = difflib.get_close_matches(name, CATALOG, n=1)
        meant = f"Did you mean {close[0]}? " if close else ""
        raise ConfigError(f"there is no search space {name!r}. {meant}Spaces: {', '.join(CATALOG)}.")
    return CATALOG[name](config, device)


@dataclass(frozen=True)
class CatalogLine:
    """One row of the catalog's table."""

    name: str
    searches: str
    presets: tuple[str, ...]
    """those that can take it"""

    @property
    def suits(self) -> str:
        """The presets in words."""
        if len(self.presets) == len(PRESETS):
            return "every preset"
        return ", ".join(self.presets) or "none of the presets: configurations of your own"


def catalog_lines() -> tuple[CatalogLine, ...]:
    """What there is to search by name, for a help table."""
    configs = {name: make() for name, make in PRESETS.items()}
    return tuple(
        CatalogLine(
            name,
            (inspect.getdoc(function) or "").partition("\n")[0],
            tuple(preset for preset, config in configs.items() if _takes(function, config)),
        )
        for name, function in CATALOG.items()
    )


def _takes(function: Callable[[RunConfig, Device], CatalogSpace], config: RunConfig) -> bool:
    try:
        function(config, "cpu")
    except ConfigError:
        return False
    return True


# ---- axes around the configured value -------------------------------------------------------------------


def _lr(config: RunConfig) -> tuple[Axis, ...]:
    return tuple(Axis(f"{section}.lr", _decades(optim.lr)) for section, optim in _sections(config, "optim"))


def _batch(config: RunConfig) -> tuple[Axis, tuple[TakenOut, ...]]:
    unit = (config.batch.micro_sequences or 1) * config.workers
    sizes = [size for size in (config.sequences_per_step * times for times in BATCH_FACTORS) if size >= 1]
    whole = [int(size) for size in sizes if size == int(size)]
    taken_out = tuple(
        TakenOut(
            f"batch.sequences={size}",
            f"no multiple of micro_sequences x workers ({config.batch.micro_sequences or 1} x {config.workers})",
        )
        for size in whole
        if size % unit
    )
    return Axis("batch.sequences", Choice(tuple(size for size in whole if size % unit == 0))), taken_out


def _sections(config: RunConfig, name: str) -> list[tuple[str, Any]]:
    """(path, section) of every optim, schedule or data that some phase trains by: the run's, and those of phases."""
    declared = [(f"phases.{phase.name}.{name}", getattr(phase, name)) for phase in config.phases]
    of_phases = [(path, section) for path, section in declared if section is not None]
    run = [(name, getattr(config, name))] if not config.phases or len(of_phases) < len(config.phases) else []
    return run + of_phases


def _shares(config: RunConfig) -> tuple[Axis, ...]:
    """The share of all phases but the last, from half of the configured one to halfway between it and all."""
    tokens = [phase_tokens(phase, config) for phase in config.resolved_phases()]
    own = [tokens[index] / sum(tokens[index:]) for index in range(len(tokens) - 1)]
    return tuple(
        Axis(f"phases.{phase.name}.budget.share", Float(_short(share / 2), _short((1 + share) / 2)))
        for phase, share in zip(config.phases, own, strict=False)
    )


def _dropouts(config: RunConfig) -> dict[str, float]:
    """Path -> value of every dropout that some phase trains by."""
    declared = {f"phases.{phase.name}.model.dropout": phase.model.dropout for phase in config.phases}
    of_phases = {path: own for path, own in declared.items() if own is not None}
    run = {"model.dropout": config.model.dropout} if not declared or len(of_phases) < len(declared) else {}
    return run | of_phases


def _longest_warmup(section: str, own: ScheduleConfig, config: RunConfig) -> int:
    """Twice the configured warm-up within half of the steps; a tenth of them where there is none (100: unknown)."""
    phases = [phase for phase in config.resolved_phases() if section in ("schedule", f"phases.{phase.name}.schedule")]
    counted = [phase.budget.steps or (phase.budget.tokens or 0) // config.tokens_per_step for phase in phases]
    steps = min((count for count in counted if count), default=None)
    if not own.warmup_steps:
        return max(1, steps // 10) if steps else 100
    longest = 2 * own.warmup_steps
    return max(own.warmup_steps, min(longest, steps // 2)) if steps else longest


def _decades(value: float) -> Float:
    """A decade below `value` to a decade above."""
    return Float(_short(value / 10), _short(value * 10), log=True)


def _up_to(own: float, usual: float) -> float:
    """The usual upper end of a fraction, or one that leaves room above the configured value."""
    return max(usual, _short((1 + own) / 2)) if own >= usual else usual


def _short(value: float) -> float:
    return float(f"{value:.6g}")
