"""`orchestrate evaluate`: the scores of a trained model on a text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from orchestrator.console import count, err, out, print_json
from orchestrator.experiment import cache_dir
from orchestrator.runs import existing_run, name_in
from orchestrator.target import absolute
from search_spaces.precisions import precision_of
from trainers.config import SourceConfig
from trainers.errors import ConfigError, UserError

if TYPE_CHECKING:
    from orchestrator.trained import Trained
    from trainers.data.packed import PackedTokens

ROWS = 16  # windows in one forward; the scores do not depend on it beyond rounding

SCORES = (
    ("val/loss", "loss (nats per token)"),
    ("val/perplexity", "perplexity"),
    ("val/bits_per_byte", "bits per byte"),
    ("val/bits_per_character", "bits per character"),
    ("val/accuracy", "accuracy"),
)


def score_run(
    *,
    run: str,
    data: str | None,
    text_field: str | None,
    precision: str | None,
    checkpoint: str | None,
    device: str,
    runs_dir: Path,
    json: bool,
) -> int:
    """Print the scores; the exit code. Raises UserError for a run, checkpoint or text that cannot be used."""
    existing_run(runs_dir, run)  # a misspelt name is told before torch is imported
    from orchestrator.trained import open_trained

    trained = open_trained(runs_dir, run, checkpoint=checkpoint, device=device, precision=precision)
    _check_arithmetic(trained, precision)
    with tempfile.TemporaryDirectory(prefix="orchestrate-") as folder:
        text, label = _text(trained, data, text_field, runs_dir, Path(folder))
        _say_unknown(trained, text, label)
        scores = score(trained, text)
    if json:
        print_json(
            {
                "run": name_in(runs_dir, run),
                "step": trained.step,
                "checkpoint": str(trained.checkpoint),
                "data": label,
                "precision": precision or precision_of(trained.config),
                "metrics": scores,
            }
        )
        return 0
    console = out()
    console.print(
        Text(f"{run} at step {count(trained.step)} on {label} ({count(scores['val/tokens'])} tokens scored)"),
        soft_wrap=True,
    )
    for name, meaning in SCORES:
        console.print(Text(f"  {meaning:<22} {scores[name]:.5g}"))
    return 0


def _check_arithmetic(trained: Trained, asked: str | None) -> None:
    """Raises UserError where the device cannot score in what was asked for, or in what the run was trained in."""
    from trainers.devices import check_precision

    try:
        check_precision(trained.precision, trained.device)
    except ConfigError as error:
        whose = "the run was trained in" if asked is None else "--precision asks for"
        raise UserError(
            f"{whose} {trained.precision.compute}, which is no arithmetic for this {trained.device.type} device. "
            f"Score it in another: --precision fp32."
        ) from error


def score(trained: Trained, text: PackedTokens) -> dict[str, float]:
    """val/loss and the rest over every token of a packed text."""
    from trainers.evaluate import evaluate
    from trainers.objectives import build_objective

    return evaluate(
        trained.model,
        text,
        sequence_length=trained.config.sequence_length,
        rows=ROWS,
        device=trained.device,
        precision=trained.precision,
        objective=build_objective(trained.config),
    )


def _say_unknown(trained: Trained, text: PackedTokens, label: str) -> None:
    """A note where characters of the text are not in the vocabulary: each counts as the same one, <UNK>."""
    from trainers.data.tokenizers import UNK

    if trained.tokenizer.kind == "characters" and (unknown := int((text.tokens == UNK).sum())):
        share = unknown / max(1, len(text))
        note = f"{count(unknown)} characters of {label} ({share:.1%}) are unknown to this model: scored as <UNK>."
        err().print(Text(note, style="yellow"), soft_wrap=True)


def _text(
    trained: Trained, data: str | None, text_field: str | None, runs_dir: Path, folder: Path
) -> tuple[PackedTokens, str]:
    """The text to score and what to call it: `data` packed into `folder`, or the run's own validation text."""
    if data is None:
        from trainers.data.prepare import prepare

        prepared = prepare(
            trained.config, cache_dir(runs_dir), run_dir=trained.checkpoint.parent.parent, progress=_progress
        )
        return prepared.phases[-1].validation, "its validation text"
    if not data:
        raise UserError("DATA is empty: name a file, a folder, python-stdlib or hf:OWNER/NAME.")
    from trainers.data.corpora import open_corpus
    from trainers.data.packed import build_packed

    source = (
        SourceConfig(corpus=absolute(data))
        if text_field is None
        else SourceConfig(corpus=absolute(data), text_field=text_field)
    )
    corpus = open_corpus(source)
    packed = build_packed(
        folder / "packed",
        [corpus.pieces()],
        trained.tokenizer,
        end_documents=True,
        progress=_progress,
        total_bytes=corpus.size_bytes or 0,
    )
    return packed, source.corpus


def _progress(done_bytes: int, total_bytes: int, what: str) -> None:
    """On a terminal only, on one line of standard error."""
    console = err()
    if console.is_terminal:
        share = f" {done_bytes / total_bytes:.0%}" if total_bytes else ""
        console.print(Text(f"\r{what}{share} "), end="\r")
