"""Parcel: which files of a working directory a job takes along, and the zip that carries them.

Ray would pack the directory by itself, but it would tell neither what it packs nor how large that is before it is
uploaded, and it packs `.env` and whatever data lies about.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import SubmissionError

MIB = 1 << 20
LIMIT = 20 * MIB
"""A parcel lives in the memory of the cluster's head and goes to every node: code and small texts, no corpora."""
DATA_LIMIT = 5 * MIB
"""A folder without Python that is larger is taken for data."""
NEVER = (
    *(".git", ".venv", "venv", ".env", ".env.*", "*.egg-info/", "__pycache__/", ".*_cache/", ".hypothesis/"),
    *("/runs/", "mlruns/", "mlartifacts/", "*.db", "*.db-journal", "*.db-shm", "*.db-wal"),
)
IGNORE_FILES = (".gitignore", ".rayignore")
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files give the same zip, which is then uploaded once

Matcher = Callable[[str], bool]


@dataclass(frozen=True)
class Parcel:
    """The files that are sent, and the folders that were taken for data and stay here."""

    root: Path
    files: dict[str, int]
    """path below the root ('/' between its parts) -> bytes, in order"""
    left_out: dict[str, int]
    """folder of data -> bytes"""

    @property
    def size(self) -> int:
        """Bytes before compression."""
        return sum(self.files.values())

    def holds(self, path: Path) -> bool:
        """Whether the file, or every file of the folder that is not hidden, is sent."""
        if path.is_dir():
            found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
            return all(self.holds(file) for file in found if not _hidden(file.relative_to(path)))
        try:
            return path.resolve().relative_to(self.root.resolve()).as_posix() in self.files
        except ValueError:
            return False

    def write(self, target: Path) -> None:
        """The zip: the same bytes for the same files."""
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in self.files:
                entry = zipfile.ZipInfo(name, ZIP_EPOCH)
                entry.external_attr = (stat.S_IFREG | (0o755 if os.access(self.root / name, os.X_OK) else 0o644)) << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, (self.root / name).read_bytes())


def pack(root: Path, excludes: Sequence[str] = ()) -> Parcel:
    """What is sent of `root`: without what .gitignore, .rayignore, NEVER and `excludes` name, and without data.

    Raises SubmissionError where nothing is left, or more than LIMIT, naming the biggest entries.
    """
    if not root.is_dir():
        raise SubmissionError(f"the working directory {root} is no folder.")
    files = dict(sorted(_walk(root, "", [_matcher([*NEVER, *excludes], "")])))
    data = {folder: size for folder, size in _folders_without_python(files).items() if size > DATA_LIMIT}
    kept = {name: size for name, size in files.items() if name.split("/")[0] not in data}
    parcel = Parcel(root, kept, data)
    if not kept:
        raise SubmissionError(f"nothing of {root} would be sent: .gitignore or .rayignore names it all.")
    if parcel.size > LIMIT:
        raise SubmissionError(_too_large(parcel))
    return parcel


def _walk(root: Path, folder: str, matchers: list[Matcher]) -> Iterator[tuple[str, int]]:
    """Regular files below `folder` that no matcher names, with their sizes; links to folders are not followed."""
    matchers = matchers + [_matcher(lines, folder) for lines in _ignore_lines(root / folder)]
    with os.scandir(root / folder) as entries:
        for entry in entries:
            name = folder + entry.name
            if entry.is_dir(follow_symlinks=False):
                if not any(match(name + "/") for match in matchers):
                    yield from _walk(root, name + "/", matchers)
            elif entry.is_file() and not any(match(name) for match in matchers):
                yield name, entry.stat().st_size


def _ignore_lines(folder: Path) -> Iterator[list[str]]:
    for name in IGNORE_FILES:
        if (folder / name).is_file():
            yield (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()


def _matcher(lines: Sequence[str], folder: str) -> Matcher:
    """Whether the patterns of an ignore file that lies in `folder` name a path below the root."""
    from ray._private.thirdparty.pathspec import PathSpec  # with which Ray reads these files

    patterns = PathSpec.from_lines("gitwildmatch", lines)
    return lambda name: bool(patterns.match_file(name.removeprefix(folder)))


def _folders_without_python(files: dict[str, int]) -> Counter[str]:
    """Folders right below the root that hold no Python at all, with their bytes."""
    parts = [(name.split("/")[0], name, size) for name, size in files.items() if "/" in name]
    code = {folder for folder, name, _ in parts if name.endswith(".py")}
    sizes: Counter[str] = Counter()
    for folder, _, size in parts:
        if folder not in code:
            sizes[folder] += size
    return sizes


def _too_large(parcel: Parcel) -> str:
    entries: Counter[str] = Counter()
    for name, size in parcel.files.items():
        entries["/".join(name.split("/")[:2])] += size
    biggest = ", ".join(f"{name} ({mib(size)})" for name, size in entries.most_common(5))
    return (
        f"{parcel.root} has {mib(parcel.size)} to send, and a job takes at most {mib(LIMIT)} along: it goes through "
        f"the memory of the cluster's head. The biggest: {biggest}. Name in .rayignore what the job does not need, and "
        "put data onto a disk that the cluster sees."
    )


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def mib(n_bytes: float) -> str:
    """'3.2 MiB'."""
    return f"{n_bytes / MIB:.1f} MiB"
