"""Where a run came from, as flat text: its configuration, the commit, the package versions, the machine."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch", "ray", "mlflow", "numpy", "pydantic", "safetensors", "tokenizers", "sentencepiece", "datasets",
    "deepspeed", "bitsandbytes",
)  # fmt: skip


def flatten(value: object, prefix: str = "") -> dict[str, str]:
    """Dotted path -> text, in the words of YAML (`null`, `true`), as `orchestrate show` and the overrides write it.

    A list of parts that have names is keyed by name (`phases.code.budget.steps`), other parts by position, and a list
    of plain values is one value.
    """
    if isinstance(value, Mapping):
        parts = {str(key): part for key, part in value.items()}
    elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(p, Mapping) for p in value):
        parts = _keyed_parts(value)
    else:
        return {prefix: _scalar(value)}
    flat: dict[str, str] = {}
    for key, part in parts.items():
        flat |= flatten(part, f"{prefix}.{key}" if prefix else key)
    return flat


def _keyed_parts(parts: Sequence[object]) -> dict[str, object]:
    names = [part.get("name") if isinstance(part, Mapping) else None for part in parts]
    named = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return {
        str(name) if named else str(index): part for index, (name, part) in enumerate(zip(names, parts, strict=True))
    }


def _scalar(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    return str(value)


def git_state(directory: Path | None = None) -> dict[str, str]:
    """`git.commit`, `git.branch`, `git.dirty` of a checkout; empty where there is no git or no commit."""
    commit = _git(directory, "rev-parse", "HEAD")
    if not commit:
        return {}
    return {
        "git.commit": commit,
        "git.branch": _git(directory, "rev-parse", "--abbrev-ref", "HEAD") or "HEAD",
        "git.dirty": _scalar(bool(_git(directory, "status", "--porcelain", "--untracked-files=no"))),
    }


def _git(directory: Path | None, *arguments: str) -> str:
    # Without optional locks `git status` cannot collide with a person's own git command.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=directory, env=environment, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def package_versions() -> dict[str, str]:
    """`version.NAME` of the packages that can change a result, as installed; nothing is imported."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_environment(directory: Path | None = None) -> dict[str, str]:
    """Tags of a run: git state of `directory` (default: the current one), versions, python, host, and MLflow's own."""
    git = git_state(directory)
    tags = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
    }
    if git:
        tags |= {"mlflow.source.git.commit": git["git.commit"], "mlflow.source.git.branch": git["git.branch"]}
    return tags | git | package_versions()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())
