"""The embedded corpus: the text of the running interpreter's own standard library.

`python-stdlib` is the modules as they are; `python-stdlib/prose` is the English of their docstrings and of comments
that have a line to themselves; `python-stdlib/code` is the source without those, so that prose and code share no text.
One module is one document. Modules that are tests, tables or not ASCII are left out (ASCII keeps a character vocabulary
near 100), the rest is drawn in the order of the sha256 of their paths, so that the last tenth is like the first nine.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from inspect import cleandoc
from pathlib import Path
from typing import Any

from trainers.data.content_hash import CORPUS_FORMAT, FileHashes, digest
from trainers.data.pieces import Piece, document_pieces, normalise_newlines, whole_documents
from trainers.errors import DataError

VIEWS = ("python-stdlib", "python-stdlib/prose", "python-stdlib/code")
LIMIT_BYTES = 6_000_000
STRING_OR_COMMENT = re.compile(
    r"""#[^\n]*|\"{3}(?:[^\\]|\\.)*?\"{3}|'{3}(?:[^\\]|\\.)*?'{3}|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'""", re.DOTALL
)
LEFT_OUT = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "pydoc_data",
    "encodings", "ensurepip", "lib-dynload",
}  # fmt: skip


@dataclass(frozen=True)
class StdlibCorpus:
    """One of the three views of the standard library; 6 MB of source in all."""

    name: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the modules' source, whichever view."""
        return sum(len(source) for _, source in _modules())

    def pieces(self) -> Iterator[Piece]:
        for _, source in _modules():
            yield from document_pieces(_view(self.name, source), len(source))

    def documents(self) -> Iterator[str]:
        return whole_documents(self.pieces())

    def content_hash(self, hashes: FileHashes | None = None) -> str:
        del hashes  # 6 MB are hashed in milliseconds
        return digest(CORPUS_FORMAT, self.name, _modules_hash())

    def describe(self) -> dict[str, Any]:
        return {
            "corpus": self.name,
            "kind": "embedded",
            "size_bytes": self.size_bytes,
            "modules": len(_modules()),
            "python": sys.version.split()[0],
        }


@cache
def _modules() -> tuple[tuple[str, str], ...]:
    """(relative path, source with newlines as \\n) of the chosen modules, in corpus order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    chosen, total = [], 0
    for name in sorted(_candidates(root), key=lambda name: sha256(name.encode()).digest()):
        data = (root / name).read_bytes()
        if not data or not data.isascii() or b"\0" in data:
            continue
        if total + len(data) > LIMIT_BYTES:
            break
        chosen.append((name, normalise_newlines(data.decode("ascii"))))
        total += len(data)
    if not chosen:
        raise DataError(
            f"{VIEWS[0]}: this Python keeps no source of its standard library in {root}. "
            "Name a text file or folder as the corpus instead."
        )
    return tuple(chosen)


def _candidates(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith(("config-", "."))]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):  # that one describes the machine
                yield Path(folder, name).relative_to(root).as_posix()


@cache
def _modules_hash() -> str:
    return digest([[name, sha256(source.encode()).hexdigest()] for name, source in _modules()])


@cache
def _split(source: str) -> tuple[str, str]:
    """(prose, code) of a module: docstrings and whole-line comments, and the lines that are left."""
    lines = source.split("\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError:
        return "", source
    docstrings = dict(_docstrings(tree, lines))
    in_string = _lines_in_strings(source)
    prose: list[tuple[int, str]] = [(first, text) for first, (_, text, _) in docstrings.items()]
    code: list[str] = []
    number = 1
    while number <= len(lines):
        line = lines[number - 1]
        if number in docstrings:
            last, _, only = docstrings[number]
            code += [" " * (len(line) - len(line.lstrip())) + "pass"] if only else []
            number = last
        elif line.lstrip().startswith("#") and number not in in_string:
            prose.append((number, line.strip().lstrip("#").strip()))
        else:
            code.append(line)
        number += 1
    return _paragraphs(sorted(prose)), re.sub(r"\n{4,}", "\n\n\n", "\n".join(code)).strip("\n") + "\n"


def _docstrings(tree: ast.Module, lines: list[str]) -> Iterator[tuple[int, tuple[int, str, bool]]]:
    """(first line, (last line, cleaned text, whether it is all of the body)) of docstrings that own their lines."""
    for node in _statements(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
            continue
        first = node.body[0]
        if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
            continue
        text, last = first.value.value, first.end_lineno or first.lineno
        before, after = lines[first.lineno - 1][: first.col_offset], lines[last - 1][first.end_col_offset :]
        if isinstance(text, str) and not before.strip() and not after.strip():
            yield first.lineno, (last, cleandoc(text), len(node.body) == 1 and not isinstance(node, ast.Module))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all statements below it; expressions, which are most of a tree, are not visited."""
    yield node
    for block in ("body", "orelse", "handlers", "finalbody", "cases"):
        children = getattr(node, block, ())
        if isinstance(children, list):  # a lambda's body is an expression
            for child in children:
                yield from _statements(child)


def _lines_in_strings(source: str) -> set[int]:
    """Lines that a string literal goes on over: a # there is no comment."""
    inside: set[int] = set()
    line, at = 1, 0
    for match in STRING_OR_COMMENT.finditer(source):
        line += source.count("\n", at, match.start())
        at = match.start()
        inside.update(range(line + 1, line + 1 + match[0].count("\n")))
    return inside


def _paragraphs(prose: list[tuple[int, str]]) -> str:
    """Docstrings and runs of comment lines as paragraphs; lines without a letter (rules, boxes) are dropped."""
    paragraphs: list[str] = []
    before = -1
    for number, text in prose:
        if not re.search("[A-Za-z]", text) or text.startswith(("!/", "-*-")) or "\0" in text:
            continue
        if number == before + 1:
            paragraphs[-1] += "\n" + text
        else:
            paragraphs.append(text)
        before = number
    return "\n\n".join(paragraphs) + "\n" if paragraphs else ""


def _view(name: str, source: str) -> str:
    if name == VIEWS[0]:
        return source
    prose, code = _split(source)
    return prose if name == VIEWS[1] else code
