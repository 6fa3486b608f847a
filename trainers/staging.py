"""Staging: the directory in which the ranks make one checkpoint, before it has a name.

Every rank writes its files here, and leaves a note of their sizes and digests; rank 0 waits for the notes and writes
state.json and the manifest. No collective is needed, so all this happens beside the training.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from trainers.filesystem import Filesystem, remove_tree, write_file
from trainers.manifest import MANIFEST, STATE, FileEntry, Manifest
from trainers.safetensors_io import file_size, write_safetensors

HEADROOM = 1.2  # of the predicted bytes must be free before a save begins
POLL_S = 0.01

_TEMPORARY = re.compile(r"\.tmp-.+-(\d+)\.(\d+)(?:\.(\d+))?")  # .tmp-WHAT-GENERATION.ATTEMPT[.SAVE]

Payload = Mapping[str, Mapping[str, torch.Tensor]]
"""file name -> tensor name -> contiguous CPU tensor"""


class SaveFailed(Exception):
    """A checkpoint that could not be written for a reason outside the program."""


class Temporary(NamedTuple):
    """Something of ours that is not a checkpoint (any more, or yet)."""

    path: Path
    owner: tuple[int, int]
    """generation and attempt"""
    save: int | None
    """which save of that attempt; None for a pointer"""


def temporary_name(what: str, owner: tuple[int, int], save: int | None = None) -> str:
    return f".tmp-{what}-{owner[0]}.{owner[1]}" + ("" if save is None else f".{save}")


def temporaries(directory: Path) -> list[Temporary]:
    """Whatever bears such a name here."""
    found = []
    for name in sorted(os.listdir(directory)) if directory.is_dir() else ():
        if match := _TEMPORARY.fullmatch(name):
            save = int(match[3]) if match[3] else None
            found.append(Temporary(directory / name, (int(match[1]), int(match[2])), save))
    return found


class Staging:
    """One rank's hands in the staging directory of one save."""

    def __init__(self, path: Path, filesystem: Filesystem, *, rank: int, world_size: int):
        self.path = path
        self._fs = filesystem
        self._rank = rank
        self._world_size = world_size

    def write_payload(self, payload: Payload) -> dict[str, FileEntry]:
        """This rank's files, durable; what the manifest will say of them. Raises OSError and SaveFailed."""
        directory = self.path.parent
        if not directory.is_dir():
            self._fs.mkdir(directory)
            self._fs.fsync_dir(directory.parent)
        if self._fs.free_space(directory) < predicted_bytes(payload) * HEADROOM:
            raise SaveFailed("no space left on device")
        self._fs.mkdir(self.path)
        return {
            name: FileEntry(*write_safetensors(self._fs, self.path / name, tensors))
            for name, tensors in payload.items()
        }

    def leave_note(self, files: Mapping[str, FileEntry] | None) -> None:
        """Tell rank 0 what this rank wrote; None: that it could not."""
        content = None if files is None else {name: [entry.size, entry.sha256] for name, entry in files.items()}
        note = self._note(self._rank)
        temporary = note.with_suffix(".tmp")
        write_file(self._fs, temporary, json.dumps(content).encode())
        self._fs.rename(temporary, note)

    def collect_notes(self, timeout_s: float, check: Callable[[], None]) -> dict[str, FileEntry]:
        """What the other ranks wrote, once they all have; `check` runs while waiting.

        Raises SaveFailed where a rank could not write, or is silent for too long.
        """
        deadline = time.monotonic() + timeout_s
        files: dict[str, FileEntry] = {}
        for rank in range(1, self._world_size):
            content = json.loads(self._await(rank, deadline, check))
            if content is None:
                raise SaveFailed(f"rank {rank} could not write its part")
            files |= {name: FileEntry(*entry) for name, entry in content.items()}
            self._fs.unlink(self._note(rank))
        return files

    def write_manifest(self, manifest: Manifest, state: bytes) -> None:
        """state.json, then manifest.json; after this the directory is whole and durable."""
        write_file(self._fs, self.path / STATE, state)
        write_file(self._fs, self.path / MANIFEST, manifest.render())
        self._fs.fsync_dir(self.path)

    def abandon(self, payload: Payload) -> None:
        """Remove what this rank began, as far as the disk still allows; rank 0 removes everything."""
        with suppress(OSError):
            if self._rank == 0:
                remove_tree(self._fs, self.path)
                return
            for name in payload:
                remove_tree(self._fs, self.path / name)  # makes room for the note
            self.leave_note(None)

    def _await(self, rank: int, deadline: float, check: Callable[[], None]) -> bytes:
        while True:
            with suppress(FileNotFoundError):
                return self._note(rank).read_bytes()
            if time.monotonic() > deadline:
                raise SaveFailed(f"rank {rank} did not write its part in time")
            check()
            time.sleep(POLL_S)

    def _note(self, rank: int) -> Path:
        return self.path / f"note-{rank:05d}.json"


def predicted_bytes(payload: Payload) -> int:
    return sum(file_size(tensors) for tensors in payload.values())
