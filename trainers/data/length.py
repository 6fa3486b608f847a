"""The least text that a phase can be trained and scored on."""

from __future__ import annotations

from collections.abc import Sequence

from trainers.config import RunConfig
from trainers.errors import DataError


def refuse_short(
    config: RunConfig,
    phase: str,
    corpora: Sequence[str],
    train_tokens: Sequence[int | None],
    validation_tokens: int | None,
) -> None:
    """Refuses a phase whose training text is shorter than one step, or whose held-out text has nothing to score.

    Args:
        train_tokens: of each text that rows are cut from; None for a stream
        validation_tokens: None where they are not known yet
    Raises:
        DataError: the rule, the values and how much text would do.
    """
    length, sequences = config.sequence_length, config.sequences_per_step
    rows = [None if tokens is None else max(0, tokens - 1) // length for tokens in train_tokens]
    known = [row for row in rows if row is not None]
    who = f"phase {phase!r} ({', '.join(corpora)})"
    fraction = next(p for p in config.resolved_phases() if p.name == phase).data.validation.fraction
    if len(known) == len(rows) and sum(known) < sequences:
        rule = f"data.sequence_length {length} x {sequences} sequences a step + 1"
        _refuse(who, length * sequences + 1, rule, sum(t for t in train_tokens if t is not None), fraction)
    if 0 in known:
        _refuse(
            who,
            length + 1,
            f"data.sequence_length {length} + 1",
            min(t for t in train_tokens if t is not None),
            fraction,
        )
    if validation_tokens is not None and validation_tokens < 2:
        raise DataError(
            f"{who}: the held-out part has {validation_tokens} tokens, at least 2 are needed to score one. "
            f"Use more text, or a larger data.validation.fraction than {fraction:g}."
        )


def _refuse(who: str, needed: int, rule: str, present: int, fraction: float) -> None:
    raise DataError(
        f"{who}: too little text. Training needs at least {needed:,} tokens ({rule}), but what is left to train on "
        f"after holding out {fraction:g} has {present:,}. Use more text (with characters or bytes as tokens at least "
        f"{int(needed / (1 - fraction)) + 1:,} of them), or lower batch.sequences or data.sequence_length."
    )
