"""A streaming writer of the safetensors format, and a reader that checks before it trusts.

The format (huggingface/safetensors, README "Format"): 8 bytes little-endian length of the header; the header, a JSON
object of name -> {dtype, shape, data_offsets}, padded with spaces; the tensors' bytes, one after the other.

The library's own writer builds the whole file in memory while it holds the interpreter lock. This one writes straight
from the tensors' memory, in pieces, without the lock, and computes the file's SHA-256 on the way.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from trainers.errors import CheckpointError
from trainers.filesystem import Filesystem, write_all

CHUNK = 4 << 20  # bytes hashed and written at a time: large beside a system call, small beside a last-level cache
LARGEST_HEADER = 64 << 20  # bytes; the library itself refuses more than 100 MB

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
}


def file_size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that `write_safetensors` will write."""
    return len(_header(tensors)) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_safetensors(filesystem: Filesystem, path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """A durable file at `path`; its size in bytes and its SHA-256 in hex.

    The tensors lie contiguous on the CPU and must not change meanwhile. Raises OSError where the disk does.
    """
    digest = hashlib.sha256()
    size = 0
    descriptor = filesystem.create(path)
    try:
        for piece in _pieces(tensors):
            digest.update(piece)
            write_all(filesystem, descriptor, piece)
            size += len(piece)
        filesystem.fsync(descriptor)
    finally:
        filesystem.close(descriptor)
    return size, digest.hexdigest()


def read_safetensors(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of one file by name; nothing is unpickled.

    Raises CheckpointError for a link, a header that cannot be, or anything the safetensors library refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_header(path)
    try:
        tensors: dict[str, torch.Tensor] = load_file(path, device=device)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a sound safetensors file: {error}.") from error
    return tensors


def check_header(path: Path) -> None:
    """Raises CheckpointError unless `path` is a regular file whose header fits into it and into LARGEST_HEADER."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.read(descriptor, 8), "little")
    finally:
        os.close(descriptor)
    if size < 8 or length > min(size - 8, LARGEST_HEADER):
        raise CheckpointError(
            f"{path} is not a sound safetensors file: its header claims {length:,} bytes of a file of {size:,} "
            f"(at most {LARGEST_HEADER:,} are read)."
        )


def open_regular(path: Path) -> int:
    """Descriptor for reading a plain file; a symbolic link, folder or device is a CheckpointError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read as a plain file: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a plain file.")
    return descriptor


def _ordered(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Widest elements first, so that every tensor is aligned; then by name, so that equal states make equal files."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    entries: dict[str, object] = {}
    offset = 0
    for name, tensor in _ordered(tensors):
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _dtype(name, tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _dtype(name: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"tensor {name!r} is {tensor.dtype}, which the safetensors format does not know.")
    return DTYPES[tensor.dtype]


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    assert sys.byteorder == "little", "safetensors files are little-endian"
    yield memoryview(_header(tensors))
    for _, tensor in _ordered(tensors):
        data = raw_bytes(tensor)
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; no copy."""
    assert tensor.device.type == "cpu" and tensor.is_contiguous(), "a snapshot is contiguous and on the CPU"
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
