"""What all trials of a sweep must share, and why: they are compared at equal tokens on equal text."""

from __future__ import annotations

import re

from search_spaces.precisions import PRECISIONS
from search_spaces.trial import PRECISION, SHARE, places
from trainers.config import RunConfig

_TEXT = "trials are compared on equal text"
_TOKENS = "trials are compared at equal tokens"
_SCORING = "trials are compared by the same scoring"
_SPEED = "it changes speed, not the result; set it as an override"
_RECORD = "it does not change the result; set it as an override"

# (paths, why), the first that fits; an empty reason: may be searched. A phase's paths follow the run's.
HELD: tuple[tuple[str, str], ...] = (
    (r"preset|phase name", "it is a label"),
    (r"seed", "the best seed is luck; repeat every point over several seeds instead (--seeds 3)"),
    (r"(workers|device|compile|engine|parallel|deepspeed\..+|deterministic|model\.activation_checkpointing)", _SPEED),
    (r"init_from", "all trials must start from the same weights"),
    (r"tokenizer(\..+)?", "a loss per token means something else under every tokenizer"),
    (r"model\.vocab_size", "it belongs to the tokenizer, which all trials share"),
    (r"data\.sources\.\d+\.weight", ""),  # a mixture's weights may be searched
    (r"data\.(sources|validation|stream_block|stream_validation_documents)(\..+)?", _TEXT),
    (r"batch\.tokens", "search batch.sequences instead, the one name of the batch size in every sweep"),
    (r"batch\.micro_sequences", "it is what memory allows, found once and the same for all; search batch.sequences"),
    (r"budget\.share", ""),  # of a phase; the total stays equal
    (r"budget(\..+)?", f"{_TOKENS}; with several phases, phases.NAME.budget.share moves tokens between them"),
    (r"(evaluation|early_stopping)(\..+)?", _SCORING),
    (r"(checkpoint|logging|samples)(\..+)?", _RECORD),
    (r"precision\..+", f"search {PRECISION} instead, whose values are {', '.join(PRECISIONS)}"),
)
# What the weights of `init_from` leave open; the rest of the model is theirs.
_FREE_OF_INITIAL_WEIGHTS = {"model.dropout", "model.dropout_positions", "model.init_std"}


def why_held(path: str, config: RunConfig) -> str:
    """Why `path` must be the same in every trial; empty where it may be searched."""
    plain, of_phase = _as_of_the_run(path, config)
    if config.init_from and plain.startswith("model.") and plain not in _FREE_OF_INITIAL_WEIGHTS:
        return f"the weights of {config.init_from} (init_from) fix the model's architecture"
    for pattern, why in HELD:
        if re.fullmatch(pattern, plain):
            return why
    return _without_effect(plain, config) if not of_phase else ""


def _as_of_the_run(path: str, config: RunConfig) -> tuple[str, bool]:
    """The path without its phase, and whether it had one."""
    if SHARE.fullmatch(path):
        return "budget.share", True
    found = re.fullmatch(r"phases\.\d+\.(?P<rest>.+)", places(path, config)[0])
    if found is None:
        return path, False
    return ("phase name" if found["rest"] == "name" else found["rest"]), True


def _without_effect(path: str, config: RunConfig) -> str:
    """Why a value of the run changes nothing; empty where it counts for at least one phase."""
    section, _, field = path.partition(".")
    if not config.phases or path == "data.sequence_length":  # which is the run's in every phase
        return ""
    if section in ("data", "optim", "schedule"):
        silent = all(getattr(phase, section) is not None for phase in config.phases)
    else:
        silent = section == "model" and all(getattr(phase.model, field, None) is not None for phase in config.phases)
    own = ", ".join(f"phases.{phase.name}.{path}" for phase in config.phases)
    return f"every phase has its own, so the run's changes nothing; search {own}" if silent else ""
