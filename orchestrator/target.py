"""From what a person typed to one RunConfig: a preset, a YAML file or an existing run, then flags, then overrides.

Imports neither torch nor ray, and opens no data.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.runs import existing_run, is_run, name_in, read_object, run_folder, run_names, suggestion
from trainers.budget import phase_steps
from trainers.config import BudgetConfig, RunConfig, SourceConfig
from trainers.config_io import build_config, override, read_yaml
from trainers.errors import ConfigError, UserError
from trainers.schedules import endless_warmup

DEFAULT_PRESET = "fundamentallm/small"
CLOCKS = ("steps", "tokens", "epochs")
RELATIVE = re.compile(r"(?P<part>(?:phases\.[^=]+\.)?budget)\.(?P<clock>[a-z]+)=\+(?P<more>.*)")
NOT_PATHS = re.compile(r"hf:|python-stdlib(/|$)")


@dataclass(frozen=True)
class Flags:
    """The options that are short for paths of the configuration."""

    data: tuple[str, ...] = ()
    text_field: str | None = None
    workers: int | None = None
    precision: str | None = None
    seed: int | None = None
    device: str | None = None
    init_from: str | None = None

    def overrides(self) -> list[str]:
        """The plain ones in the override language."""
        named = {"workers": self.workers, "seed": self.seed, "device": self.device}
        words = {} if self.precision is None else precision_words(self.precision)
        return [f"{path}={value}" for path, value in (named | words).items() if value is not None]


def precision_words(name: str) -> dict[str, Any]:
    """What `--precision NAME` sets: path -> value. Raises UserError for an unknown name."""
    from search_spaces.precisions import PRECISIONS

    if name not in PRECISIONS:
        raise UserError(f"--precision is {', '.join(PRECISIONS)}; got {name!r}.")
    return dict(PRECISIONS[name].sets)


@dataclass(frozen=True)
class Target:
    """A complete configuration and where it came from."""

    config: RunConfig
    kind: Literal["preset", "file", "run"]
    label: str
    """the preset's, file's or run's name"""
    notes: tuple[str, ...] = ()
    """what a person should know about how it was understood"""
    loaded: RunConfig | None = None
    """what the preset, file or run itself says, where flags and settings were laid over it"""


def resolve(arguments: list[str], flags: Flags, runs_dir: Path) -> Target:
    """The configuration that `[PRESET|FILE|RUN] [path=value ...]` and the flags mean. Raises UserError."""
    label, typed = split(arguments)
    start = load(label, runs_dir)
    config, notes = start.config, list(start.notes)
    if flags.data:
        config, replaced = with_data(config, flags.data, flags.text_field)
        notes += replaced
    elif flags.text_field is not None:
        config = with_text_field(config, flags.text_field)
    # among the rest: some precisions are legal only with it
    initial = [] if flags.init_from is None else [f"init_from={_initial_run(flags.init_from, runs_dir).absolute()}"]
    changes = flags.overrides() + initial + typed
    _refuse_repeats(changes)
    changes = [absolute_budget(change, start, runs_dir) for change in changes]
    config = override(config, changes) if changes else config
    config = with_init_from(config, runs_dir)
    config = with_absolute_paths(config)
    _refuse_runs_among_text(config, runs_dir)
    notes += _warmup_notes(config)
    return Target(config, start.kind, start.label, tuple(notes), start.config)


def split(arguments: list[str]) -> tuple[str, list[str]]:
    """The target (the default preset where none is named) and the overrides."""
    target, overrides = DEFAULT_PRESET, arguments
    if arguments and ("=" not in arguments[0] or os.path.exists(arguments[0])):
        target, overrides = arguments[0], arguments[1:]
    for item in overrides:
        path, equals, _ = item.partition("=")
        if not equals or not path:
            raise UserError(
                f"after the preset, file or run come settings such as budget.steps=300, but got {item!r}."
                + (" Put text with blanks in quotes." if len(overrides) > 1 else "")
            )
    return target, overrides


# ---- the three kinds of target -----------------------------------------------------------------------


def load(label: str, runs_dir: Path) -> Target:
    """The configuration a label stands for: a preset, else a file, else a run of the runs folder."""
    from trainers.presets import PRESETS

    if label in PRESETS:
        return Target(PRESETS[label](), "preset", label)
    if os.path.isfile(label):
        return load_file(Path(label))
    name = name_in(runs_dir, label)
    if _may_be_name(name) and is_run(run_folder(runs_dir, name)):
        return load_run(runs_dir, name)
    if label.endswith((".yaml", ".yml")):
        raise UserError(f"there is no file {label!r} (looked in {os.getcwd()}).")
    if os.path.isdir(label):
        raise UserError(f"{label} is a folder. Name a preset, a YAML file or a run; give a corpus with --data {label}.")
    known = sorted(PRESETS) + run_names(runs_dir)
    raise UserError(
        f"{_brief(label)} is no preset, no file and no run in {runs_dir}.{suggestion(label, known)} "
        "`orchestrate presets` and `orchestrate runs` list what there is."
    )


def load_file(path: Path) -> Target:
    """A configuration file: ours, or one in the style of the fundamentallm guide."""
    from trainers import guide

    try:
        data = read_yaml(path)
    except ConfigError as error:
        hint = "" if path.suffix in (".yaml", ".yml") else f" To train on the text in it, say --data {path}."
        raise ConfigError(f"{error}{hint}") from None
    if guide.is_guide(data):
        translated, notes = guide.translate(data)
        said = (
            f"{path} is written in the words of the fundamentallm guide; `orchestrate show {path}` prints it in ours.",
        )
        return Target(build_config(translated), "file", str(path), (*said, *notes))
    return Target(build_config(data), "file", str(path))


def load_run(runs_dir: Path, name: str) -> Target:
    """The configuration an existing run was started with. Raises UserError where it cannot be read."""
    folder = existing_run(runs_dir, name)
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"run {name!r} is damaged: {path} is missing. Start another with --name, or restore that file.")
    return Target(build_config(read_yaml(path)), "run", name_in(runs_dir, name))


# ---- flags that are more than one path ----------------------------------------------------------------


def with_data(config: RunConfig, corpora: tuple[str, ...], text_field: str | None) -> tuple[RunConfig, list[str]]:
    """The configuration with other text, joined in order, in the run and in each phase that has its own data."""
    sources = [_source(corpus, text_field) for corpus in corpora]
    values = config.model_dump(mode="json")
    values["data"]["sources"] = sources
    own = [phase for phase in values["phases"] if phase["data"] is not None]
    for phase in own:
        phase["data"]["sources"] = sources
    notes = []
    if own:
        names = ", ".join(phase["name"] for phase in own)
        notes.append(f"--data replaces the text of every phase ({names}); phases.NAME.data.sources sets one alone.")
    return build_config(values), notes


def with_text_field(config: RunConfig, text_field: str) -> RunConfig:
    """The configuration with the text of every source in another field."""
    values = config.model_dump(mode="json")
    for part in [values["data"], *(phase["data"] for phase in values["phases"] if phase["data"])]:
        for source in part["sources"]:
            source["text_field"] = text_field
    return build_config(values)


def _source(corpus: str, text_field: str | None) -> dict[str, Any]:
    if not corpus:
        raise UserError("--data is empty: name a file, a folder, python-stdlib or hf:OWNER/NAME.")
    source = SourceConfig(corpus=corpus) if text_field is None else SourceConfig(corpus=corpus, text_field=text_field)
    return source.model_dump(mode="json")


def with_init_from(config: RunConfig, runs_dir: Path) -> RunConfig:
    """`init_from` as the absolute folder of a run where there is one of that name."""
    if config.init_from is not None and (found := _find_run(config.init_from, runs_dir)) is not None:
        return config.model_copy(update={"init_from": str(found.absolute())})
    return config


def _initial_run(run: str, runs_dir: Path) -> Path:
    try:
        return _find_run(run, runs_dir) or existing_run(runs_dir, run)
    except UserError as error:
        raise UserError(f"--init-from: {error} A run that began from one that is gone goes on by its name.") from error


def _find_run(run: str, runs_dir: Path) -> Path | None:
    name = name_in(runs_dir, run)
    if _may_be_name(name) and is_run(folder := run_folder(runs_dir, name)):
        return folder
    path = Path(run).expanduser()
    return path if is_run(path) else None


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Files named relative to the current folder get their full path: a run goes on from wherever it is continued."""
    values = config.model_dump(mode="json")
    for part in [values["data"], *(phase["data"] for phase in values["phases"] if phase["data"])]:
        for source in part["sources"]:
            source["corpus"] = absolute(source["corpus"])
    for part, key in ((values["tokenizer"], "path"), (values["deepspeed"], "config")):
        if part[key] is not None:
            part[key] = absolute(part[key])
    return config if values == config.model_dump(mode="json") else build_config(values)


def absolute(text: str) -> str:
    """The full path of a corpus that is on the disk; any other name as it is."""
    if NOT_PATHS.match(text) or "\0" in text:
        return text
    path = os.path.abspath(os.path.expanduser(text))
    return path if os.path.exists(path) else text


def _refuse_runs_among_text(config: RunConfig, runs_dir: Path) -> None:
    """A runs folder below a corpus would make every run part of the text of the next (names with a dot are no text)."""
    runs = runs_dir.resolve()
    for corpus in sorted({source.corpus for phase in config.resolved_phases() for source in phase.data.sources}):
        if NOT_PATHS.match(corpus) or not os.path.isdir(corpus):
            continue
        folder = Path(os.path.realpath(corpus))
        if not runs.is_relative_to(folder):
            continue
        if not any(part.startswith(".") for part in runs.relative_to(folder).parts):
            raise UserError(
                f"the runs folder {runs_dir} lies inside the text {corpus}, so that what a run writes would be read as "
                "text by the next. Put the text into a folder of its own, or choose another --runs-dir."
            )


# ---- raising the budget of a run ----------------------------------------------------------------------


def absolute_budget(change: str, start: Target, runs_dir: Path) -> str:
    """`budget.steps=+500` on a finished run as the total it means; any other change as it is."""
    found = RELATIVE.fullmatch(change)
    if found is None:
        return change
    part, clock, more = found["part"], found["clock"], found["more"]
    if start.kind != "run":
        raise UserError(f"{change} adds to the budget of an existing run; for a new one say {part}.{clock}={more}.")
    budget = _budget_at(start.config, part)
    now = getattr(budget, clock, None) if budget is not None and clock in CLOCKS else None
    if now is None:
        raise UserError(f"{change}: {_how_to_add(start)}")
    total = now + _amount(change, clock, more)
    outcome = read_object(run_folder(runs_dir, start.label) / "outcome.json", [])
    if outcome.get("state") != "finished":
        raise UserError(
            f"{change} adds to a finished run, and {start.label!r} has not finished, so adding again would be easy to "
            f"do twice. `orchestrate train {start.label}` continues it; {part}.{clock}={total} sets its new total."
        )
    return f"{part}.{clock}={total}"


def _budget_at(config: RunConfig, part: str) -> BudgetConfig | None:
    if part == "budget":
        return config.budget
    which = part.removeprefix("phases.").removesuffix(".budget")
    for index, phase in enumerate(config.phases):
        if which in (phase.name, str(index)):
            return phase.budget
    return None


def _how_to_add(start: Target) -> str:
    budgets = [("budget", start.config.budget)]
    budgets += [(f"phases.{phase.name}.budget", phase.budget) for phase in start.config.phases]
    ways = [
        f"{part}.{clock}=+{'1' if clock == 'epochs' else 'N'} (now {getattr(budget, clock):,})"
        for part, budget in budgets
        if budget is not None
        for clock in CLOCKS
        if getattr(budget, clock) is not None
    ]
    return f"run {start.label!r} counts its budget otherwise. Say {' or '.join(ways)}."


def _amount(change: str, clock: str, more: str) -> int | float:
    try:
        amount: int | float = float(more) if clock == "epochs" else int(more)
    except ValueError:
        amount = 0
    if not 0 < amount < 1e18:
        whole = "a number" if clock == "epochs" else "a whole number"
        raise UserError(
            f"{change}: after the '+' comes {whole} above 0, such as +{'0.5' if clock == 'epochs' else 500}."
        )
    return amount


def _warmup_notes(config: RunConfig) -> list[str]:
    """About warm-ups longer than their budget, where that can be told without the text."""
    found = []
    for phase in config.resolved_phases():
        if phase.budget.epochs is None:
            steps = phase_steps(phase.budget, tokens_per_step=config.tokens_per_step, steps_per_epoch=None)
            found.append(endless_warmup(phase.schedule, steps))
    return [note for note in found if note]


def _refuse_repeats(changes: list[str]) -> None:
    paths = [change.partition("=")[0] for change in changes]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise UserError(f"{', '.join(twice)} is set more than once on this command line: leave one of them.")


def _may_be_name(text: str) -> bool:
    """Whether asking the runs folder for it makes sense: everything else gets the message that lists presets too."""
    from trainers.config import NAME_PATTERN

    return all(NAME_PATTERN.fullmatch(part) for part in text.split("/")) and text.count("/") < 2


def _brief(label: str) -> str:
    return repr(label if len(label) <= 60 else label[:57] + "...")
