"""Laws of the parcel: Ray's own choice of files, less what never travels, and a limit that is told in sizes."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from cluster.errors import SubmissionError
from cluster.parcel import DATA_LIMIT, LIMIT, NEVER, pack

TREE = {
    "main.py": "print()",
    "notes.txt": "a",
    "big.log": "b",
    "keep.log": "c",
    "package/__init__.py": "",
    "package/part.py": "x = 1",
    "package/cache/one.bin": "1",
    "package/deep/inner/two.py": "2",
    "package/deep/inner/secret.py": "3",
    "package/deep/runs/of.py": "a package may be named so below the root",
    "texts/a.txt": "aa",
    "texts/b.md": "bb",
    ".gitignore": "*.log\n!keep.log\ncache/\n",
    "package/.rayignore": "deep/inner/secret.py\n",
    "package/deep/.gitignore": "*.tmp\n",
    "package/deep/x.tmp": "t",
    ".rayignore": "# a comment\n/texts/b.md\n",
}
NEVER_SENT = {
    ".git/config": "[core]",
    ".env": "PASSWORD=1",
    "package/.env": "PASSWORD=1",
    ".venv/lib/x.py": "x",
    "runs/a/model.safetensors": "w",
    "package/__pycache__/part.pyc": "p",
    "mlflow.db": "db",
    ".mypy_cache/x.json": "{}",
}


def grow(root: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def rays_choice(root: Path, excludes: list[str], target: Path) -> set[str]:
    """The files Ray itself would pack."""
    from ray._private.runtime_env.packaging import create_package

    create_package(str(root), target, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(target) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_the_ignore_files_mean_what_they_mean_to_ray(tmp_path: Path) -> None:
    root = grow(tmp_path / "tree", TREE)
    ours = set(pack(root).files)
    assert ours == rays_choice(root, [], tmp_path / "ray.zip")
    assert "keep.log" in ours and "package/deep/runs/of.py" in ours
    assert ours.isdisjoint({"big.log", "texts/b.md", "package/cache/one.bin", "package/deep/inner/secret.py"})
    (root / ".rayignore").unlink()
    assert "texts/b.md" in pack(root).files, "or else the file was not read at all"


def test_what_never_travels(tmp_path: Path) -> None:
    root = grow(grow(tmp_path / "tree", TREE), NEVER_SENT)
    assert set(pack(root).files) == rays_choice(root, list(NEVER), tmp_path / "ray.zip")
    assert set(pack(root).files).isdisjoint(NEVER_SENT)
    assert set(NEVER_SENT) - {".git/config"} <= rays_choice(root, [], tmp_path / "all.zip") | {".venv/lib/x.py"}


def test_the_zip_holds_the_files_and_is_the_same_twice(tmp_path: Path) -> None:
    root = grow(tmp_path / "tree", TREE)
    (root / "main.py").chmod(0o755)
    parcel = pack(root)
    parcel.write(tmp_path / "one.zip")
    os.utime(root / "main.py", (1, 1))
    pack(root).write(tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert {name: archive.read(name).decode() for name in archive.namelist()} == {
            name: TREE[name] for name in parcel.files
        }
        assert archive.getinfo("main.py").external_attr >> 16 & 0o111
    (root / "main.py").write_text("print(1)")
    pack(root).write(tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() != (tmp_path / "two.zip").read_bytes()


def test_large_data_stays_here_and_code_does_not(tmp_path: Path) -> None:
    root = grow(tmp_path, TREE)
    for folder in ("corpus", "package"):
        with (root / folder / "large.bin" if folder == "package" else grown(root / folder)).open("wb") as file:
            file.truncate(DATA_LIMIT + 1)
    parcel = pack(root)
    assert parcel.left_out == {"corpus": DATA_LIMIT + 1}
    assert "package/large.bin" in parcel.files and not any(name.startswith("corpus/") for name in parcel.files)
    assert not parcel.holds(root / "corpus") and parcel.holds(root / "package" / "large.bin")


def grown(folder: Path) -> Path:
    folder.mkdir()
    return folder / "large.bin"


def test_too_much_is_refused_with_the_sizes_of_the_biggest(tmp_path: Path) -> None:
    root = grow(tmp_path, TREE)
    weights = root / "package" / "weights.bin"
    with weights.open("wb") as file:
        file.truncate(LIMIT)
    with pytest.raises(SubmissionError, match=r"package/weights\.bin \(20\.0 MiB\)"):
        pack(root)
    with weights.open("wb") as file:
        file.truncate(LIMIT // 2)
    assert pack(root).size < LIMIT
    assert pack(root, ["weights.bin"]).size < 1000


def test_a_folder_that_goes_in_part_is_not_held(tmp_path: Path) -> None:
    root = grow(tmp_path, TREE)
    parcel = pack(root)
    assert parcel.holds(root / "texts" / "a.txt") and not parcel.holds(root / "texts" / "b.md")
    assert not parcel.holds(root / "texts")
    assert parcel.holds(root / "package" / "deep" / "runs")
    assert not parcel.holds(tmp_path.parent)


def test_nothing_to_send(tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match="nothing"):
        pack(grow(tmp_path, {".gitignore": "*", "a.py": ""}))
    with pytest.raises(SubmissionError, match="no folder"):
        pack(tmp_path / "a.py")


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    root = grow(tmp_path / "tree", TREE)
    (root / "loop").symlink_to(root)
    (root / "alias.py").symlink_to(root / "main.py")
    files = pack(root).files
    assert "alias.py" in files and not any(name.startswith("loop") for name in files)
