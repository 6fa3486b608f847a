"""A packed text is the tokens of its documents, whoever builds it and however often the builder is killed."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from trainers.data.packed import DOCUMENTS, META, TOKENS, PackedTokens, build_packed
from trainers.data.pieces import Piece, document_pieces
from trainers.data.tokenizers import ByteTokenizer, CharacterTokenizer
from trainers.errors import DataError

TEXTS = ["To be, or not to be:\n", "日本", "that is the question. " * 9000, "x"]
ROOT = Path(__file__).resolve().parents[3]


def pieces(texts: list[str] = TEXTS) -> Iterator[Piece]:
    for text in texts:
        yield from document_pieces(text, len(text))


def pack(directory: Path, texts: list[str] = TEXTS, **options: object) -> PackedTokens:
    return build_packed(directory, [pieces(texts)], ByteTokenizer(), end_documents=True, **options)


def test_the_packed_text_is_every_document_and_its_end(tmp_path: Path) -> None:
    packed = pack(tmp_path / "a")
    expected = [token for text in TEXTS for token in [*text.encode(), ByteTokenizer.eos_id]]
    assert packed.tokens.tolist() == expected
    starts = [0, *np.cumsum([len(text.encode()) + 1 for text in TEXTS]).tolist()[:-1]]
    assert packed.document_starts.tolist() == starts
    assert (packed.n_bytes, packed.n_chars) == (len("".join(TEXTS).encode()), len("".join(TEXTS)))
    assert (len(packed), packed.n_documents, packed.tokens.dtype) == (len(expected), 4, np.uint16)
    assert isinstance(packed.tokens, np.memmap)
    packed.verify()


def test_sources_are_joined_in_order_and_counted_apart(tmp_path: Path) -> None:
    parts = [pieces(["ab", "c"]), pieces(["日"])]
    packed = build_packed(tmp_path / "a", parts, CharacterTokenizer("abc日"), end_documents=False)
    assert packed.tokens.tolist() == [4, 5, 6, 7]
    assert packed.document_starts.tolist() == [0, 2, 3]
    assert [(part.n_chars, part.n_bytes, part.n_documents, part.n_tokens) for part in packed.parts] == [
        (3, 3, 2, 3), (1, 3, 1, 1),
    ]  # fmt: skip


def test_a_document_cut_short_starts_but_does_not_end(tmp_path: Path) -> None:
    front = [Piece("ab", True), Piece("cd", False)]
    packed = build_packed(tmp_path / "a", [front, [Piece("e", True)]], ByteTokenizer(), end_documents=True)
    assert packed.tokens.tolist() == [97, 98, 257, 99, 100, 101, 257]
    assert packed.document_starts.tolist() == [0, 3, 5]


def test_many_ids_take_four_bytes(tmp_path: Path) -> None:
    wide = CharacterTokenizer("".join(map(chr, range(0x10000, 0x21000))))
    packed = build_packed(tmp_path / "a", [pieces(["\U00020fff"])], wide, end_documents=False)
    assert (packed.tokens.dtype, packed.tokens.tolist()) == (np.uint32, [wide.vocab_size - 1])


def test_an_empty_text_packs_to_nothing(tmp_path: Path) -> None:
    packed = pack(tmp_path / "a", [])
    assert (len(packed), len(packed.document_starts)) == (0, 0)


def test_what_is_there_is_not_built_again_and_travels_as_a_path(tmp_path: Path) -> None:
    first = pack(tmp_path / "a")
    again = build_packed(tmp_path / "a", [_explode()], ByteTokenizer(), end_documents=True)
    sent = pickle.dumps(again)
    assert len(sent) < 1000
    assert pickle.loads(sent).tokens.tolist() == first.tokens.tolist()


def _explode() -> Iterator[Piece]:
    raise AssertionError("read again")
    yield


def test_a_file_changed_or_cut_after_packing_is_refused_by_name(tmp_path: Path) -> None:
    for damage, name in [
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), TOKENS),
        (lambda f: f.write_bytes(b"\1" + f.read_bytes()[1:]), TOKENS),
        (lambda f: f.write_bytes(f.read_bytes()[:8]), DOCUMENTS),
        (lambda f: f.unlink(), DOCUMENTS),
        (lambda f: f.unlink(), META),
        (lambda f: f.write_text(f.read_text()[:50]), META),
        (lambda f: f.write_text(f.read_text().replace('"n_chars": ', '"n_chars": 1')), META),
    ]:
        directory = tmp_path / str(time.monotonic_ns())
        pack(directory)
        os.utime(directory / TOKENS)  # the control: a copy with another time is as good
        PackedTokens(directory)
        damage(directory / name)
        with pytest.raises(DataError, match=name):
            PackedTokens(directory)


def test_a_change_that_hides_behind_the_old_time_is_found_by_verify(tmp_path: Path) -> None:
    pack(tmp_path / "a")
    path = tmp_path / "a" / TOKENS
    before = path.stat()
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=TOKENS):
        PackedTokens(tmp_path / "a").verify()


# ---- two builders, killed builders, full disks ---------------------------------------------------------------------

BUILDER = """
import os, sys, time
from pathlib import Path
from trainers.data.packed import build_packed
from trainers.data.pieces import Piece
from trainers.data.tokenizers import ByteTokenizer

def slow():
    for number in range(40):
        print("piece", number, flush=True)
        time.sleep(float(sys.argv[2]))
        yield Piece("word %d " % number * 300_000, number % 5 == 4)

packed = build_packed(Path(sys.argv[1]), [slow()], ByteTokenizer(), end_documents=True,
                      progress=lambda *told: print(*told, flush=True))
print("done", packed.sha256, flush=True)
"""


def builder(directory: Path, pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(directory), str(pause)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output


def test_two_processes_building_at_once_build_it_once(tmp_path: Path) -> None:
    outputs = [finish(process) for process in [builder(tmp_path / "a", 0.02), builder(tmp_path / "a", 0.02)]]
    assert len({output.split("done ")[1] for output in outputs}) == 1
    assert sum("piece 0" in output for output in outputs) == 1  # the other waited, and read nothing
    PackedTokens(tmp_path / "a").verify()


def test_a_killed_builder_leaves_nothing_that_is_believed(tmp_path: Path) -> None:
    whole = finish(builder(tmp_path / "whole")).split("done ")[1]
    for pieces_before in (1, 20, 39):
        process = builder(tmp_path / "a", 0.01)
        assert process.stdout
        for line in process.stdout:
            if line.startswith(f"piece {pieces_before}"):
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "a").exists()
        assert any(tmp_path.glob(".tmp-a-*"))  # the control: it was killed at work
    assert finish(builder(tmp_path / "a")).split("done ")[1] == whole
    assert not any(tmp_path.glob(".tmp-a-*"))


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # writing past it fails as on a full disk
    try:
        with pytest.raises(DataError, match="no room on the disk"):
            pack(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [".lock-a"]
    assert len(pack(tmp_path / "a"))


def test_a_source_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Piece]:
        yield Piece("x" * 3_000_000, False)
        raise DataError("cut.txt: damaged")

    with pytest.raises(DataError, match="damaged"):
        build_packed(tmp_path / "a", [failing()], ByteTokenizer(), end_documents=False)
    assert [path.name for path in tmp_path.iterdir()] == [".lock-a"]


def test_progress_is_told_in_stored_bytes(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    pack(tmp_path / "a", progress=lambda *one: told.append(one), total_bytes=123, what="packing")
    assert told[-1] == (sum(map(len, TEXTS)), 123, "packing")


def test_the_meta_is_json_with_the_checksums(tmp_path: Path) -> None:
    meta = json.loads((pack(tmp_path / "a").path / META).read_text())
    assert set(meta["files"]) == {TOKENS, DOCUMENTS}
    assert meta["tokenizer"] == ByteTokenizer().fingerprint
