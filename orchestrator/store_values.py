"""What MLflow accepts as a name, a text, a batch, and how our values become such."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MAX_METRICS, MAX_PARAMS = 1000, 100  # of one log_batch
MAX_PARAM_CHARS, MAX_TAG_CHARS, MAX_KEY_CHARS = 6000, 8000, 250
ROW_FIELDS = frozenset({"step", "time_ms", "phase"})  # of a row of metrics.jsonl: not metrics


def is_row(row: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl has the whole numbers without which MLflow has no place for its metrics."""
    return all(type(row.get(key)) is int and 0 <= row[key] < 2**63 for key in ("step", "time_ms"))


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a row of metrics.jsonl, `tokens` among them; texts, and what no float can hold, are left out."""
    numbers = {key: value for key, value in row.items() if key not in ROW_FIELDS and isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if isinstance(value, float) or abs(value) < 2**1023}


def legal_name(key: str) -> str:
    """A key as MLflow allows it: letters, digits and `_-. :/`, at most 250 of them."""
    return re.sub(r"[^\w\-. :/]", "_", key)[:MAX_KEY_CHARS]


def clip(text: str, limit: int) -> str:
    """`text`, or as much of it as fits with a note of its length."""
    if len(text) <= limit:
        return text
    note = f" ... ({len(text)} characters; whole in config.yaml)"
    return text[: limit - len(note)] + note


def batches(items: list[T], size: int) -> Iterator[list[T]]:
    """The items in order, `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def checkpoint_link(target: Path) -> dict[str, Any]:
    """Where a committed checkpoint lies, its step, and the sha256 of its manifest (which holds those of its files)."""
    manifest = (target / "manifest.json").read_bytes()
    return {
        "path": str(target.absolute()),
        "step": json.loads(manifest).get("step"),
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
    }
