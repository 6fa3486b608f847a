"""What find-lr and find-batch share: where their findings lie, how MLflow learns of them, and commands to paste.

Both try things out beside every run: in RUNS/.find, which is no run's name, and in MLflow under the preset's
experiment with the tag `kind`. Neither needs Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.text import Text

from orchestrator.console import finite, out, pairs, print_json
from orchestrator.experiment import cache_dir
from orchestrator.provenance import describe_environment
from search_spaces.precisions import precision_of
from trainers.config import RunConfig
from trainers.config_io import fingerprint
from trainers.data.prepare import data_hashes
from trainers.deepspeed_config import tuned_by
from trainers.initial import initial_hash

if TYPE_CHECKING:
    from orchestrator.target import Flags, Target
    from orchestrator.tracking import EndState, Store

Kind = Literal["find-lr", "find-batch", "bench"]
FOLDER = ".find"


@dataclass(frozen=True)
class Typed:
    """The command line as a person typed it, for the commands that follow from what was found."""

    target: Target
    settings: tuple[str, ...]
    flags: Flags
    runs_dir: Path | None
    """where another than the default was named"""

    def command(self, verb: str, *more: str, without: Sequence[str] = ()) -> str:
        """`orchestrate VERB` on the same target with the same flags, the settings `more` and not those `without`."""
        kept = [item for item in self.settings if item.partition("=")[0] not in without]
        again = ["--fresh"] if verb == "train" and self.target.kind == "run" else []
        words = ["orchestrate", verb, self.target.label, *kept, *more, *self._flag_words(), *again]
        return shlex.join(words)

    def _flag_words(self) -> list[str]:
        flags, words = self.flags, []
        for corpus in flags.data:
            words += ["--data", corpus]
        named = {
            "--text-field": flags.text_field,
            "--workers": flags.workers,
            "--precision": flags.precision,
            "--seed": flags.seed,
            "--device": flags.device,
            "--init-from": flags.init_from,
            "--runs-dir": self.runs_dir,
        }
        for name, value in named.items():
            words += [name, str(value)] if value is not None else []
        return words


def finding_name(kind: Kind, config: RunConfig, runs_dir: Path, settings: Mapping[str, Any]) -> str:
    """The same for the same question: kind, preset and a digest of configuration, text and `settings`."""
    hashes = data_hashes(config, cache_dir(runs_dir))
    run = fingerprint(config, hashes, initial_hash(config), tuned_by(config))
    digest = hashlib.sha256(json.dumps([run, dict(settings)], sort_keys=True).encode()).hexdigest()
    return f"{kind.removeprefix('find-')}-{config.preset.replace('/', '-')}-{digest[:8]}"


def finding_folder(runs_dir: Path, name: str) -> Path:
    return runs_dir / FOLDER / name


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when the body is done, and vanishes when it is not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(finite(dict(value)), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Finding:
    """What goes into MLflow."""

    kind: Kind
    name: str
    folder: Path
    config: RunConfig
    settings: Mapping[str, Any]
    """of the search itself, logged as params `find.*`"""
    rows: Sequence[Mapping[str, Any]]
    """metrics with their `step`"""
    tags: Mapping[str, str]
    state: EndState
    reason: str


def log_finding(store: Store, finding: Finding) -> tuple[str | None, str]:
    """The MLflow run's id and where to look at it; no id, and the reason, where the store is away by now."""
    from orchestrator.tracking import TrackingRefused, TrackingUnavailable

    config = finding.config
    try:
        run = store.open_run(
            config.preset.split("/")[0],
            finding.name,
            run_id=None,
            tags={
                **describe_environment(),
                "kind": finding.kind,
                "preset": config.preset,
                "precision": precision_of(config),
                "run_path": str(finding.folder),
                **finding.tags,
            },
            params={**config.model_dump(mode="json"), "find": dict(finding.settings)},
        )
        ending: tuple[EndState, str] = ("KILLED", "user")
        try:
            now = time.time_ns() // 1_000_000
            run.log_metrics([{"time_ms": now, **row} for row in finding.rows])
            run.log_artifact(finding.folder)
            ending = (finding.state, finding.reason)
        finally:
            run.finish(*ending)
    except (TrackingUnavailable, TrackingRefused) as error:
        return None, f"MLflow did not take it all ({error}); the files in {finding.folder} have everything"
    return run.run_id, run.url_hint()


def show_intent(facts: Mapping[str, Any], rows: Sequence[tuple[str, str]], *, json: bool) -> int:
    """Print what a dry run found would be done, as `facts` or as lines. Exit code 0."""
    if json:
        print_json(facts)
    else:
        out().print(pairs([(name, Text(value)) for name, value in rows]))
    return 0


def show_way_on(result: Mapping[str, Any], picture: str, where: str) -> None:
    """Print what is to be opened or pasted, each on a line of its own however long it is."""
    console = out()
    console.print(Text.assemble(("\npicture  ", "dim"), picture), soft_wrap=True)
    console.print(Text.assemble(("mlflow   ", "dim"), where), soft_wrap=True)
    for command in result["commands"].values():
        console.print(Text(f"\n  {command}"), soft_wrap=True)
