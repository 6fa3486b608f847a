"""Whatever a text is wrapped in, the same documents come out; what cannot be read is refused by name and place."""

from __future__ import annotations

import ast
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainers.data.hub_server import HubServer, parquet
from trainers.config import SourceConfig
from trainers.data.corpora import open_corpus
from trainers.data.pieces import Piece, chunks, document_pieces, whole_documents
from trainers.errors import DataError

zstandard = pytest.importorskip("zstandard")
pytest.importorskip("pyarrow")
pytest.importorskip("huggingface_hub.constants")
DOCUMENTS = ["One fish.\n", "two\n\n  indented  fish\n", "naïve café 日本語 🎉", "x" * 3_000_000]


def corpus_of(path: Path, **fields: str):
    return open_corpus(SourceConfig(corpus=str(path), **fields))


def read(path: Path, **fields: str) -> list[str]:
    return list(corpus_of(path, **fields).documents())


def jsonl(documents: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in documents).encode()


def refusal(path: Path, **fields: str) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **fields)
    message = str(caught.value)
    assert str(path) in message
    assert "Traceback" not in message
    return message


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip


@pytest.mark.parametrize("suffix", PACKINGS)
def test_every_format_and_compression_yields_the_same_documents(tmp_path: Path, suffix: str) -> None:
    for name, content, expected in [
        ("a.txt", DOCUMENTS[1].encode(), [DOCUMENTS[1]]),
        ("long.md", DOCUMENTS[3].encode(), [DOCUMENTS[3]]),
        ("a.jsonl", jsonl(DOCUMENTS), DOCUMENTS),
        ("a.parquet", parquet(DOCUMENTS, group=2), DOCUMENTS),
    ]:
        path = tmp_path / (name + suffix)
        path.write_bytes(PACKINGS[suffix](content))
        assert read(path) == expected
        assert sum(piece.stored for piece in corpus_of(path).pieces()) == pytest.approx(path.stat().st_size, abs=1)


def test_a_folder_is_its_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, text in {"b/1.txt": "B1", "a.txt": "A", "c.md": "C", ".hidden/x.txt": "no", "empty.txt": ""}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "d.jsonl").write_bytes(jsonl(["D1", "D2"]))
    (tmp_path / "picture.png").write_bytes(b"\0")
    assert read(tmp_path) == ["A", "B1", "C", "D1", "D2"]
    described = corpus_of(tmp_path).describe()
    assert (described["passed_over"], described["passed_over_examples"]) == (1, ["picture.png"])


def test_newlines_become_one_kind_and_the_byte_order_mark_goes(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbfone\r\ntwo\rthree\n" + b"y" * (1 << 20) + b"\r\nend\r"
    (tmp_path / "a.txt").write_bytes(raw)
    assert read(tmp_path / "a.txt") == ["one\ntwo\nthree\n" + "y" * (1 << 20) + "\nend\n"]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["one\r\ntwo\r"]).replace(b"\n", b"\r\n"))
    assert read(tmp_path / "a.jsonl") == ["one\ntwo\n"]


@pytest.mark.parametrize("shift", range(4))
def test_characters_cut_by_a_block_survive(tmp_path: Path, shift: int) -> None:
    text = "x" * shift + "日" * 700_000  # 3 bytes each: some character lies across every block boundary
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [text]


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_missing_files_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    assert f"Did you mean {tmp_path / 'shakespeare.txt'}" in refusal(tmp_path / "shakespaere.txt")
    with pytest.raises(DataError, match="Did you mean python-stdlib"):
        open_corpus(SourceConfig(corpus="python-stdlb"))
    with pytest.raises(DataError, match="no corpus"):
        open_corpus(SourceConfig(corpus="a\0b"))


def test_what_is_no_text_is_refused_with_file_and_byte(tmp_path: Path) -> None:
    def written(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    assert "empty" in refusal(written("empty.txt", b""))
    assert "NUL at byte 1,500,000: it is a binary" in refusal(written("b.txt", b"x" * 1_500_000 + b"\0"))
    assert "not UTF-8 at byte 2,000,001 (0xe9)" in refusal(written("l.txt", b"x" * 2_000_001 + "é".encode("latin1")))
    assert "not UTF-8 at byte 1" in refusal(written("cut.txt", b"x\xe6\x97"))
    assert "looks like UTF-16" in refusal(written("u.txt", "text".encode("utf-16")))
    assert "looks like gzip" in refusal(written("g.txt", gzip.compress(os.urandom(500))))
    assert "byte 3 of the decompressed" in refusal(written("l.txt.gz", gzip.compress(b"abc\xff")))
    assert "not a whole Parquet file" in refusal(written("p.parquet", parquet(DOCUMENTS)[:-100]))
    (tmp_path / "d").mkdir()
    written("d/x.png", b"x")
    assert "no file in this folder can be read (1 of other kinds)" in refusal(tmp_path / "d")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_truncated_or_damaged_archive_is_refused_at_every_length(tmp_path: Path, name: str, suffix: str) -> None:
    content = {
        "a.txt": b"To be, or not to be. " * 9,
        "a.jsonl": jsonl(DOCUMENTS[:3]),
        "a.parquet": parquet(DOCUMENTS[:3]),
    }
    whole = PACKINGS[suffix](content[name])
    path = tmp_path / (name + suffix)
    for length in {1, 5, 10, len(whole) // 2, len(whole) - 5, len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert "truncated" in (message := refusal(path)) or "not valid" in message
    path.write_bytes(whole[:20] + bytes(byte ^ 0x55 for byte in whole[20:40]) + whole[40:])
    refusal(path)
    path.write_bytes(whole)  # the control: it is the cut that is refused
    assert read(path)


def test_two_archives_one_behind_the_other_are_one_text(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        path = tmp_path / ("a.txt" + suffix)
        path.write_bytes(PACKINGS[suffix](b"one ") + PACKINGS[suffix](b"two"))
        assert read(path) == ["one two"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b"[1, 2]", "a JSON array instead of an object"),
        (b'{"txt": "x"}', "no field 'text' (it has txt); did you mean 'txt'"),
        (b'{"text": null}', "holds a JSON null"),
        (b'{"text": 3}', "holds a JSON number"),
        (b'{"text": "a\\u0000b"}', "NUL in 'text'"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    ],
)
def test_the_first_bad_line_of_a_jsonl_is_named_and_the_others_counted(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["good", "good"]) + b"\n" + line + b"\n" + jsonl(["good"]) + line)
    message = refusal(path)
    assert "line 4: " in message
    assert reason in message
    assert "2 of 6 lines" in message


def test_a_json_array_and_a_wrong_field_are_explained(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"text": "x"}]')
    assert "jq -c '.[]'" in refusal(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x"], "content"))
    assert read(tmp_path / "a.jsonl", text_field="content") == ["x"]
    (tmp_path / "a.parquet").write_bytes(parquet(["x"]))
    assert "no column 'content' (it has text)" in refusal(tmp_path / "a.parquet", text_field="content")


def test_a_50_mb_line_is_read(tmp_path: Path) -> None:
    text = "word " * 10_000_000
    (tmp_path / "a.jsonl").write_bytes(jsonl([text]))
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.txt") == [text]
    assert max(len(piece.text) for piece in corpus_of(tmp_path / "a.txt").pieces()) <= 1 << 20


def test_no_permission_is_said() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "a.txt")
        path.write_text("secret")
        path.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            assert "no permission" in refusal(path)
        finally:
            os.seteuid(user)


# ---- content hashes ------------------------------------------------------------------------------------------------


def test_the_content_hash_is_of_the_text_not_of_its_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("same")
    second.write_text("same")
    assert corpus_of(first).content_hash() == corpus_of(second).content_hash()
    second.write_text("diff")
    assert corpus_of(first).content_hash() != corpus_of(second).content_hash()
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(jsonl(["x"]))
    assert corpus_of(lines).content_hash() != corpus_of(lines, text_field="other").content_hash()


# ---- pieces and chunks ---------------------------------------------------------------------------------------------

TEXTS = st.text(st.sampled_from("ab .,\n\t 日'5"), max_size=200)


@given(st.lists(TEXTS, max_size=5), st.integers(1, 40))
def test_chunks_are_the_same_text_cut_small(documents: list[str], limit: int) -> None:
    documents = [text for text in documents if text]
    pieces = [piece for text in documents for piece in document_pieces(text)]
    cut = list(chunks(pieces, limit))
    assert list(whole_documents(cut)) == documents
    assert all(len(chunk.text) <= limit for chunk in cut)


def test_a_chunk_ends_between_a_word_and_a_space() -> None:
    text = "word  another,\n\n third" * 50
    starts = [chunk.text[0] for chunk in chunks([Piece(text, True)], 30)][1:]
    ends = [chunk.text[-1] for chunk in chunks([Piece(text, True)], 30)]
    assert set(starts) <= set(" \n")
    assert not set(ends) & set(" \n")


# ---- the embedded corpus -------------------------------------------------------------------------------------------


def embedded(view: str) -> list[str]:
    return list(open_corpus(SourceConfig(corpus=view)).documents())


def test_the_embedded_corpus_is_several_megabytes_of_ascii_and_always_the_same() -> None:
    for view, least in {"python-stdlib": 5e6, "python-stdlib/prose": 1e6, "python-stdlib/code": 3e6}.items():
        texts = embedded(view)
        assert least < sum(map(len, texts)) <= 6e6
        assert all(text.isascii() for text in texts)
        assert texts == embedded(view)
    hashes = {open_corpus(SourceConfig(corpus=view)).content_hash() for view in ("python-stdlib", "python-stdlib/code")}
    assert len(hashes) == 2


def test_the_code_is_python_without_docstrings_and_the_prose_shares_no_paragraph_with_it() -> None:
    code = embedded("python-stdlib/code")
    for text in code:
        tree = ast.parse(text)
        assert not any(line.lstrip().startswith("# ") for line in text.split("\n")[:3])
        assert ast.get_docstring(tree) is None
    paragraphs = [p for text in embedded("python-stdlib/prose") for p in text.split("\n\n") if len(p) > 120]
    joined = "\n".join(code)
    shared = [p for p in paragraphs[::7] if p in joined]
    assert len(paragraphs) > 3000
    assert not shared
    assert any(p in "\n".join(embedded("python-stdlib")) for p in paragraphs[:50])  # the control: whole modules hold it


# ---- Hub datasets --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(local_hub: HubServer) -> Iterator[HubServer]:
    pytest.importorskip("datasets")
    local_hub.repositories |= {"own/mapped": {"data/train-00000-of-00001.parquet": parquet(DOCUMENTS[:3])}}
    yield local_hub


def test_a_hub_dataset_is_its_rows(hub: HubServer) -> None:
    corpus = open_corpus(SourceConfig(corpus="hf:own/mapped"))
    assert list(corpus.documents()) == DOCUMENTS[:3]
    assert corpus.content_hash() == open_corpus(SourceConfig(corpus="hf:own/mapped")).content_hash()
    with pytest.raises(DataError, match="no column 'body'; it has text"):
        open_corpus(SourceConfig(corpus="hf:own/mapped", text_field="body")).content_hash()
    for wrong in ({"corpus": "hf:own/missing"}, {"corpus": "hf:own/mapped", "split": "nope"}):
        with pytest.raises(DataError, match="cannot open hf:own/m"):
            open_corpus(SourceConfig(**wrong)).content_hash()
