"""Which version of the project this is."""

from __future__ import annotations

import importlib.metadata

UNKNOWN = "(not installed)"


def version() -> str:
    """The version of the distribution that holds this package, such as '0.1.0'."""
    names = importlib.metadata.packages_distributions().get("orchestrator", [])
    return importlib.metadata.version(names[0]) if names else UNKNOWN
