"""Bytes from plain, gzip and zstd files, and UTF-8 text from bytes, with the errors a person can act on."""

from __future__ import annotations

import codecs
import errno
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainers.data.pieces import Piece
from trainers.errors import DataError, UserError

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Block:
    data: bytes
    stored: int
    """bytes of the file read for it: fewer than len(data) where the file is compressed"""


def blocks(path: Path, compression: str) -> Iterator[Block]:
    """The file's bytes, decompressed, in blocks of about 1 MB. compression: "", "gz" or "zst".

    Raises DataError naming the file where it cannot be opened or is damaged or cut off.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            if compression == "gz":
                yield from _gzip_blocks(path, file)
            elif compression == "zst":
                yield from _zstd_blocks(path, file)
            else:
                while data := file.read(BLOCK_BYTES):
                    yield Block(data, len(data))
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file or folder the system will not open."""
    if error.errno == errno.ENAMETOOLONG:
        return DataError(f"{str(path)[:60]}...: no file's name can be this long ({len(str(path)):,} characters).")
    if isinstance(error, PermissionError):
        return DataError(f"{path}: no permission to read it.")
    return DataError(f"{path}: cannot be read ({error.strerror or error}).")


def _gzip_blocks(path: Path, file: io.RawIOBase) -> Iterator[Block]:
    reader, before = gzip.GzipFile(fileobj=file), 0
    while True:
        try:
            data = reader.read(BLOCK_BYTES)
        except EOFError:
            raise DataError(
                f"{path}: truncated gzip, the file ends after {file.tell():,} bytes in the middle of its data. "
                "Fetch or write it again."
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: not valid gzip near byte {file.tell():,} ({error}).") from None
        if not data:
            return
        yield Block(data, file.tell() - before)
        before = file.tell()


def _zstd_blocks(path: Path, file: io.RawIOBase) -> Iterator[Block]:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path}: reading .zst needs the zstandard package: pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    within_frame, read = False, 0
    while data := file.read(1 << 14):  # small: 16 KB may unfold to megabytes
        read += len(data)
        out, rest = [], data
        while rest:
            try:
                out.append(frame.decompress(rest))
            except zstandard.ZstdError as error:
                raise DataError(f"{path}: not valid zstd near byte {read:,} ({error}).") from None
            within_frame, rest = not frame.eof, b""
            if frame.eof:
                rest, frame = frame.unused_data, decompressor.decompressobj()
        yield Block(b"".join(out), len(data))
    if within_frame:
        raise DataError(
            f"{path}: truncated zstd, the file ends after {read:,} bytes in the middle of its data. "
            "Fetch or write it again."
        )


def text_pieces(path: Path, compression: str) -> Iterator[Piece]:
    """One document: the UTF-8 text of the file, without a byte order mark, newlines as \\n.

    Raises DataError with the byte offset (in the decompressed bytes) of a NUL or of what is not UTF-8.
    """
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    held: Piece | None = None  # the last piece must know that it ends the document
    pending, offset, stored, begun = b"", 0, 0, False
    for block in blocks(path, compression):
        data = pending + block.data
        stored += block.stored
        text, used = _decode(path, data, offset, compression, final=False)
        pending, offset = data[used:], offset + used
        text = newlines.decode(text)
        if text and not begun:
            text, begun = text.removeprefix("\ufeff"), True
        if text:
            if held:
                yield held
            held, stored = Piece(text, False, stored), 0
    tail, _ = _decode(path, pending, offset, compression, final=True)
    tail = newlines.decode(tail, final=True)
    if held and tail:
        yield held
    last = tail or (held.text if held else "")
    if last:
        yield Piece(last, True, stored + (0 if tail or not held else held.stored))


def _decode(path: Path, data: bytes, offset: int, compression: str, *, final: bool) -> tuple[str, int]:
    nul = data.find(b"\0")
    if nul >= 0:
        raise DataError(f"{path}: NUL at byte {offset + nul:,}: {_what_else(data)}. Text must be UTF-8.")
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        where = f"byte {offset + error.start:,}" + (" of the decompressed text" if compression else "")
        raise DataError(
            f"{path}: not UTF-8 at {where} (0x{data[error.start]:02x}): {_what_else(data)}. "
            "Convert it, for instance with: iconv -f LATIN1 -t UTF-8"
        ) from None


def _what_else(data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "it looks like UTF-16"
    if data[:2] == b"\x1f\x8b":
        return "it looks like gzip (name it .gz)"
    if data[:4] == b"\x28\xb5\x2f\xfd":
        return "it looks like zstd (name it .zst)"
    if data[:4] == b"PAR1":
        return "it looks like Parquet (name it .parquet)"
    return "it is a binary file" if b"\0" in data else "another encoding, or a damaged file"
