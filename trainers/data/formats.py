"""The file formats that text is read from: text, JSON Lines and Parquet, each plain, gzip or zstd."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trainers.data.pieces import Piece, document_pieces, normalise_newlines
from trainers.data.reading import Block, blocks, text_pieces, unreadable
from trainers.errors import DataError, UserError

KINDS = {"txt": "text", "md": "text", "jsonl": "jsonl", "json": "jsonl", "parquet": "parquet"}
COMPRESSIONS = ("gz", "zst")
LINE_LIMIT = 1 << 28  # bytes of one JSONL line, which must fit into memory


@dataclass(frozen=True, slots=True)
class FileFormat:
    kind: str
    """text, jsonl or parquet"""
    compression: str
    """gz, zst or nothing"""


def file_format(path: Path) -> FileFormat | None:
    """What the file's name says it is; None for a suffix not known."""
    compression, kind = _suffixes(path)
    return FileFormat(KINDS[kind], compression) if kind in KINDS else None


def named_format(path: Path) -> FileFormat:
    """How to read a file that was named itself: a suffix not known is text."""
    return file_format(path) or FileFormat("text", _suffixes(path)[0])


def _suffixes(path: Path) -> tuple[str, str]:
    """(compression, the suffix before it), lower case; "" where there is none."""
    suffixes = path.name.lower().split(".")[1:]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return compression, suffixes[-1] if suffixes else ""


def file_pieces(path: Path, known: FileFormat, text_field: str) -> Iterator[Piece]:
    """The documents of one file. Raises DataError with file and byte, line or row."""
    if known.kind == "jsonl":
        return _jsonl_pieces(path, known.compression, text_field)
    if known.kind == "parquet":
        return _parquet_pieces(path, known.compression, text_field)
    return text_pieces(path, known.compression)


# ---- JSON Lines: the rule is that every line that is not blank is an object with a string in `text_field` ----------


@dataclass(frozen=True, slots=True)
class Bad:
    """Why a line cannot be used."""

    reason: str


def _jsonl_pieces(path: Path, compression: str, text_field: str) -> Iterator[Piece]:
    lines = _lines(path, compression)
    for number, line, stored in lines:
        text = _parse(line, text_field, number)
        if isinstance(text, Bad):
            raise _broken(path, number, text, lines, text_field)
        if text is not None:
            yield from document_pieces(normalise_newlines(text), stored)


def _broken(path: Path, number: int, bad: Bad, rest: Iterator[tuple[int, bytes, int]], text_field: str) -> DataError:
    """Names the first bad line and counts the others."""
    n_bad, n_lines = 1, number
    for n_lines, line, _ in rest:
        n_bad += isinstance(_parse(line, text_field, n_lines), Bad)
    return DataError(
        f"{path}, line {number}: {bad.reason}. {n_bad} of {n_lines} lines cannot be used. "
        f"Every line must be a JSON object with a string in {text_field!r} (text_field of the source)."
    )


def _parse(line: bytes, text_field: str, number: int) -> str | Bad | None:
    """The text of a line; None for a blank line or an empty text."""
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x})")
    except (ValueError, RecursionError) as error:
        if number == 1 and line.lstrip()[:1] == b"[":
            return Bad("the file is a JSON array, one object a line is needed (convert it with: jq -c '.[]')")
        return Bad("a NUL byte: it is a binary file" if b"\0" in line else f"not valid JSON ({error})")
    if not isinstance(record, dict):
        return Bad(f"a JSON {_json_type(record)} instead of an object")
    text = record.get(text_field)
    if isinstance(text, str):
        return _usable(text, line, text_field)
    if text_field not in record:
        return Bad(f"no field {text_field!r}{_fields(text_field, [str(name) for name in record])}")
    return Bad(f"the field {text_field!r} holds a JSON {_json_type(text)} instead of a string")


def _usable(text: str, line: bytes, text_field: str) -> str | Bad | None:
    if "\0" in text:
        return Bad(f"NUL in {text_field!r}: text must not hold U+0000")
    if b"\\ud" in line or b"\\uD" in line:
        try:
            text.encode()
        except UnicodeEncodeError:
            return Bad(f"half a surrogate pair in {text_field!r}: it is no Unicode text")
    return text or None


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _fields(wanted: str, present: list[str]) -> str:
    near = difflib.get_close_matches(wanted, present, n=1)
    listed = ", ".join(present[:10]) or "none"
    return f" (it has {listed})" + (f"; did you mean {near[0]!r}" if near else "")


def _lines(path: Path, compression: str) -> Iterator[tuple[int, bytes, int]]:
    """(number from 1, line, stored bytes read since the line before) of each line."""
    number, stored, held, parts = 0, 0, 0, list[bytes]()
    for block in blocks(path, compression):
        stored += block.stored
        *ended, rest = (_without_mark(block) if not number and not parts else block.data).split(b"\n")
        for line in ended:
            number += 1
            yield number, b"".join([*parts, line]) if parts else line, stored
            parts, held, stored = [], 0, 0
        if rest:
            parts.append(rest)
            held += len(rest)
        if held > LINE_LIMIT:
            raise DataError(f"{path}, line {number + 1}: longer than {LINE_LIMIT:,} bytes. Split it into documents.")
    if parts:
        yield number + 1, b"".join(parts), stored


def _without_mark(block: Block) -> bytes:
    return block.data.removeprefix(b"\xef\xbb\xbf")


# ---- Parquet -------------------------------------------------------------------------------------------------------


def _parquet_pieces(path: Path, compression: str, text_field: str) -> Iterator[Piece]:
    if not compression:
        yield from _row_pieces(path, path, text_field)
        return
    with tempfile.TemporaryFile() as unpacked:  # Parquet is read from its end: it cannot come through a stream
        for block in blocks(path, compression):
            unpacked.write(block.data)
        unpacked.seek(0)
        yield from _row_pieces(path, unpacked, text_field)


def _row_pieces(path: Path, file: Path | IO[bytes], text_field: str) -> Iterator[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs the pyarrow package: pip install pyarrow") from None
    try:
        # A small buffer and no read-ahead: else a row group's whole column lies in memory.
        table = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        names = table.schema_arrow.names
        if text_field not in names:
            raise DataError(
                f"{path}: no column {text_field!r}{_fields(text_field, names)}. Set text_field of the source."
            )
        kind = table.schema_arrow.field(text_field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{path}: the column {text_field!r} holds {kind}, not strings.")
        stored = path.stat().st_size / max(1, table.metadata.num_rows)
        row, told = 0, 0
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is None or "\0" in text:
                    what = "no text (null)" if text is None else "NUL in the text"
                    raise DataError(f"{path}, row {row}: {what} in the column {text_field!r}.")
                upto = int(row * stored)
                yield from document_pieces(normalise_newlines(text), upto - told)
                told = upto
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise unreadable(path, error) from None
        raise DataError(f"{path}: not a whole Parquet file ({str(error).splitlines()[0]}). Write it again.") from None
