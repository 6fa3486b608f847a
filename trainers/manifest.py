"""What a checkpoint on disk is, and the reader's side of the commit protocol.

    checkpoints/step-00000300/model.safetensors optimizer.safetensors rank-00000.safetensors state.json manifest.json

Of a model in slices each rank writes its own, model-part-00000.safetensors and so on, cut along the first dimension.
The manifest lists every file with its size and SHA-256, and ends with the SHA-256 of itself. A directory is a
checkpoint when its manifest verifies and every file is as the manifest says; whatever else lies about is not.
Readers take no lock and trust no name, link or number they have not checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trainers.config import NAME_PATTERN
from trainers.errors import CheckpointError
from trainers.safetensors_io import open_regular, read_safetensors

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
SUFFIX = ".safetensors"
LARGEST_JSON = 64 << 20  # bytes of a manifest or state.json that a reader accepts
READ_CHUNK = 1 << 20

_STEP_NAME = re.compile(r"step-(\d{8,18})")
_SHA256 = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)
Warn = Callable[[str], object]


@dataclass(frozen=True)
class FileEntry:
    size: int
    """bytes"""
    sha256: str
    """64 hex digits"""

    @staticmethod
    def of(data: bytes) -> FileEntry:
        return FileEntry(len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class Manifest:
    step: int
    generation: int
    attempt: int
    world_size: int
    best: bool
    """whether it was the best so far when it was written"""
    files: Mapping[str, FileEntry]

    def render(self) -> bytes:
        """The one text that says this, its own checksum at the end."""
        fields: dict[str, Any] = {
            "format": FORMAT,
            "step": self.step,
            "generation": self.generation,
            "attempt": self.attempt,
            "world_size": self.world_size,
            "best": self.best,
            "files": {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in sorted(self.files.items())},
        }
        fields["sha256"] = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
        return json.dumps(fields, indent=1).encode() + b"\n"

    @staticmethod
    def parse(data: bytes, where: Path) -> Manifest:
        """The manifest whose rendering is exactly `data`. Raises CheckpointError for anything else."""
        try:
            fields = json.loads(data)
            files = {name: FileEntry(entry["size"], entry["sha256"]) for name, entry in fields["files"].items()}
            numbers = [fields[name] for name in ("format", "step", "generation", "attempt", "world_size")]
            _, step, generation, attempt, world_size = numbers
            manifest = Manifest(step, generation, attempt, world_size, fields["best"], files)
            whole = all(type(number) is int for number in [*numbers, *(entry.size for entry in files.values())])
            sound = whole and manifest.render() == data
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{where} is not a manifest: {type(error).__name__}.") from error
        if numbers[0] != FORMAT:
            raise CheckpointError(f"{where} has format {numbers[0]}; this version reads {FORMAT}.")
        if not sound:
            raise CheckpointError(f"{where} does not match its own checksum.")
        for name, entry in files.items():
            if not NAME_PATTERN.fullmatch(name) or not _SHA256.fullmatch(entry.sha256) or entry.size < 0:
                raise CheckpointError(f"{where} lists {name!r}, which no checkpoint holds.")
        return manifest


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def generation(self) -> int:
        return self.manifest.generation

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return self.manifest.world_size

    @property
    def stems(self) -> tuple[str, ...]:
        """The tensor files, without their ending."""
        return tuple(name.removesuffix(SUFFIX) for name in self.manifest.files if name.endswith(SUFFIX))

    @property
    def size_bytes(self) -> int:
        return sum(entry.size for entry in self.manifest.files.values())

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The JSON part of the state. Raises CheckpointError where it is not sound."""
        try:
            meta = json.loads(_read_small(self.path / STATE), object_hook=_restore_float)
        except ValueError as error:
            raise CheckpointError(f"{self.path / STATE} is not JSON: {error}.") from error
        if not isinstance(meta, dict):
            raise CheckpointError(f"{self.path / STATE} is not a JSON object.")
        return meta

    def load(self, stem: str, device: str = "cpu") -> dict[str, torch.Tensor]:
        """The named tensors of one file, or of the parts that the ranks wrote of it, put together. Raises
        CheckpointError where there is none or it is not sound."""
        if stem in self.stems:
            return read_safetensors(self.path / f"{stem}{SUFFIX}", device)
        parts = [part_stem(stem, rank) for rank in range(self.world_size)]
        if not set(parts) <= set(self.stems):
            raise CheckpointError(f"{self.path.name} holds no {stem!r}; it holds {', '.join(self.stems)}.")
        return _joined([read_safetensors(self.path / f"{part}{SUFFIX}", device) for part in parts])

    def verify(self) -> None:
        """Read every file and compare. Raises CheckpointError naming the first that differs."""
        for name, entry in self.manifest.files.items():
            found = file_sha256(self.path / name)
            if found != entry.sha256:
                raise CheckpointError(f"{name} has SHA-256 {found}, the manifest says {entry.sha256}")


def part_stem(stem: str, rank: int) -> str:
    """The file of a rank's slices of the tensors of `stem`."""
    return f"{stem}-part-{rank:05d}"


def _joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Whole tensors of slices along the first dimension; the parts are emptied meanwhile. The first has every name."""
    whole = {}
    for name in list(parts[0]):
        slices = [part.pop(name) for part in parts if name in part]
        whole[name] = torch.cat(slices) if len(slices) > 1 else slices[0]
    if left := {name for part in parts for name in part}:
        raise CheckpointError(f"the first part lacks {', '.join(sorted(left)[:5])}.")
    return whole


# ---- finding them --------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a directory of this name would hold; None for a foreign name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def committed_steps(directory: Path) -> list[int]:
    """Steps that have a directory here, ascending; nothing about their soundness."""
    try:
        with os.scandir(directory) as entries:
            steps = [step_of(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(step for step in steps if step is not None)


def read_checkpoint(directory: Path, step: int, *, verify: bool) -> Checkpoint:
    """The checkpoint of one step: manifest and sizes checked, and with `verify` every byte.

    Raises CheckpointError saying which file is wrong and how.
    """
    path = directory / step_name(step)
    if not stat.S_ISDIR(_lstat(path).st_mode):
        raise CheckpointError(f"{path.name} is not a directory")
    manifest = Manifest.parse(_read_small(path / MANIFEST), path / MANIFEST)
    if manifest.step != step:
        raise CheckpointError(f"{path.name}/{MANIFEST} is of step {manifest.step}")
    for name, entry in manifest.files.items():
        status = _lstat(path / name)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{name} is not a plain file")
        if status.st_size != entry.size:
            raise CheckpointError(f"{name} has {status.st_size:,} bytes, the manifest says {entry.size:,}")
    if STATE not in manifest.files:
        raise CheckpointError(f"{MANIFEST} lists no {STATE}")
    checkpoint = Checkpoint(path, manifest)
    if verify:
        checkpoint.verify()
    return checkpoint


def sound_checkpoints(
    directory: Path,
    *,
    verify: bool = True,
    warn: Warn = log.warning,
    damaged: Callable[[int], object] = lambda step: None,
) -> Iterator[Checkpoint]:
    """The checkpoints that can be used, newest first, each checked as it is asked for.

    One that is damaged is passed over: `warn` is told which file and how, `damaged` which step.
    """
    for step in reversed(committed_steps(directory)):
        try:
            yield read_checkpoint(directory, step, verify=verify)
        except CheckpointError as error:
            damaged(step)
            warn(f"checkpoint {step_name(step)} is damaged and not used: {error}")


def newest(directory: Path, *, verify: bool = True, warn: Warn = log.warning) -> Checkpoint | None:
    """The newest sound checkpoint."""
    return next(sound_checkpoints(directory, verify=verify, warn=warn), None)


def best(directory: Path, *, verify: bool = True, warn: Warn = log.warning) -> Checkpoint | None:
    """The best sound checkpoint.

    Each best is newer than the one before, so it is the newest of those the pointer or their own manifest calls the
    best; a crash between a commit and its pointer thus loses nothing.
    """
    pointed = pointer(directory, "best")
    for step in reversed(committed_steps(directory)):
        try:
            checkpoint = read_checkpoint(directory, step, verify=False)
            if checkpoint.manifest.best or step == pointed:
                if verify:
                    checkpoint.verify()
                return checkpoint
        except CheckpointError as error:
            warn(f"checkpoint {step_name(step)} is damaged and not used: {error}")
    return None


def pointer(directory: Path, name: str) -> int | None:
    """The step that `latest` or `best` names; None where it is missing or says nothing sound."""
    try:
        text = _read_small(directory / name).decode("ascii")
    except (CheckpointError, UnicodeDecodeError):
        return None
    return step_of(text.strip())


# ---- bytes ---------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """SHA-256 of a plain file in hex, read in pieces. Raises CheckpointError for a link or a file that is not there."""
    with os.fdopen(open_regular(path), "rb", buffering=0) as handle:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(READ_CHUNK))
        while count := handle.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def render_meta(meta: Mapping[str, Any]) -> bytes:
    """Strict JSON; infinities and NaN travel as {"$float": "inf"}."""
    try:
        text = json.dumps(meta, allow_nan=False)  # training waits for this, and tags are rare
    except ValueError:
        text = json.dumps(_tag_floats(meta), allow_nan=False)
    return text.encode() + b"\n"


def _tag_floats(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if isinstance(value, Mapping):
        return {key: _tag_floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tag_floats(item) for item in value]
    return value


def _restore_float(fields: dict[str, Any]) -> Any:
    return float(fields["$float"]) if fields.keys() == {"$float"} else fields


def _read_small(path: Path) -> bytes:
    with os.fdopen(open_regular(path), "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > LARGEST_JSON:
            raise CheckpointError(f"{path.name} has {size:,} bytes; at most {LARGEST_JSON:,} are read")
        return handle.read()


def _lstat(path: Path) -> os.stat_result:
    try:
        return os.lstat(path)
    except OSError as error:
        raise CheckpointError(f"{path.name} is missing: {error.strerror}") from error
