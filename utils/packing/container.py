"""The container of packed files: an .npz of byte arrays, which the reader does not trust.

A zip archive of `header.json` and one-dimensional uint8 arrays in numpy's .npy form. Each member is
stored, deflated or LZMA-compressed, whichever is smallest. `numpy.load`, Python's `zipfile` and programs
that support LZMA in zip files (7-Zip, but not Info-ZIP's unzip) can open it.
"""

import io
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from utils.common.errors import UserError, one_line

HEADER = "header.json"
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)
LONGEST_NPY_HEADER = 128
"""Bytes that `numpy.save` writes before a one-dimensional array; files of version 2 have fewer."""
LZMA_MEMORY = 2**24 + 2**18
"""Memory limit of the LZMA decoder in bytes: a dictionary of 16 MiB (zipfile writes 8) and some more."""


def write_archive(header: bytes, arrays: dict[str, np.ndarray]) -> bytes:
    """Return an archive of a header and uint8 arrays (n,) by name; empty arrays are left out."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        _add(archive, HEADER, header)
        for name, array in arrays.items():
            if len(array):
                file = io.BytesIO()
                np.save(file, array)
                _add(archive, f"{name}.npy", file.getvalue())
    return content.getvalue()


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entries = []
    for method in METHODS:
        # The date is always 1980-01-01 and the system Unix, so that equal content gives equal bytes.
        entry = zipfile.ZipInfo(name)
        entry.compress_type, entry.create_system = method, 3
        with zipfile.ZipFile(io.BytesIO(), "w") as trial:
            trial.writestr(entry, data, compresslevel=9)
        entries.append(entry)
    archive.writestr(min(entries, key=lambda entry: entry.compress_size), data, compresslevel=9)


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Report any error that the block raises as damage to the file.

    Raises:
        UserError: the file is truncated or damaged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Depending on what is broken, zipfile, numpy and torch raise almost anything.
        raise UserError(
            f"{path} is truncated or damaged ({one_line(error)[:120]}): write or fetch it again"
        ) from error


class Archive:
    """A packed file that is open for reading; every method may raise anything if the file is damaged."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.content = Path(path).read_bytes()
        self._archive = zipfile.ZipFile(io.BytesIO(self.content))
        entries = self._archive.infolist()
        self.entries = {entry.filename.removesuffix(".npy"): entry for entry in entries}
        if len(self.entries) != len(entries):
            raise ValueError("it names a member twice")

    def size(self, name: str) -> int:
        """Return the compressed bytes of a member, or of all planes of a stream (`name.0`, …)."""
        members = (member for member in self.entries if member == name or member.startswith(f"{name}."))
        return sum(self.entries[member].compress_size for member in members)

    def array(self, name: str, limit: int) -> np.ndarray:
        """Return an array (uint8) of at most `limit` bytes; a missing one is empty."""
        if name not in self.entries:
            return np.zeros(0, np.uint8)
        data = self.read(name, limit + LONGEST_NPY_HEADER)
        header_end = 10 + int.from_bytes(data[8:10], "little")
        return np.array(memoryview(data)[header_end:], np.uint8)

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a member, at most `limit` bytes."""
        entry = self.entries[name]
        if entry.file_size > limit or entry.compress_type not in METHODS:
            raise ValueError(f"{name} has {entry.file_size} bytes, compression method {entry.compress_type}")
        with self._archive.open(entry) as member:
            is_lzma = entry.compress_type == zipfile.ZIP_LZMA
            return self._decompress_lzma(entry) if is_lzma else member.read(entry.file_size)

    def _decompress_lzma(self, entry: zipfile.ZipInfo) -> bytes:
        """Return the content of an LZMA member; zipfile would limit neither its output nor its dictionary."""
        lengths = struct.unpack_from("<2H", self.content, entry.header_offset + 26)
        start = entry.header_offset + 30 + sum(lengths)  # after the local header, the name, extra fields
        compressed = self.content[start : start + entry.compress_size]
        # Without its first 4 bytes, and with an unknown length (8 bytes of 255), it is a .lzma file.
        alone = compressed[4:9] + b"\xff" * 8 + compressed[9:]
        data = lzma.LZMADecompressor(lzma.FORMAT_ALONE, LZMA_MEMORY).decompress(alone, entry.file_size)
        if zlib.crc32(data) != entry.CRC:
            raise ValueError(f"the checksum of {entry.filename} is wrong")
        return data
