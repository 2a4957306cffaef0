"""The container of packed files: an .npz of bytes, as small as a zip can be, read without trust.

A zip archive whose members are `header.json` and one-dimensional uint8 arrays in numpy's .npy form.
Each member is stored, deflated or LZMA-compressed, whichever takes the fewest bytes; these are
methods of the zip format, so `numpy.load`, Python's `zipfile` and programs that know LZMA in a zip
(7-Zip does, Info-ZIP's unzip does not) open the file.

What keeps it small: deflate codes bytes by their frequency alone and starts a new table where a new
plane of a stream begins, or a layer of int8 weights; .npy headers are not padded; member names are short.

What keeps the reader safe: no size that stands in the file is used to allocate; a member is
decompressed in steps up to a limit that the caller names.
"""

import io
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.common.errors import UserError

HEADER = "header.json"
STORED, DEFLATED, LZMA = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA
LZMA_VERSION = bytes((9, 4))
"""Of the LZMA SDK, which stands in front of each LZMA member."""
LZMA_FILTERS = tuple(
    {"id": lzma.FILTER_LZMA1, "preset": 6, "dict_size": 2**20, "lc": lc, "lp": 0, "pb": 0} for lc in (0, 3)
)
LZMA_PREFIX = struct.Struct("<2sHBI")
LZMA_PROPERTIES = 5
"""Bytes of the last two fields of the prefix."""
LARGEST_DICTIONARY = 2**24
END_MARKER = 2
"""Flag of a zip member: its LZMA stream has an end of its own."""
NPY_MAGIC = b"\x93NUMPY\x01\x00"
CHUNK = 2**12
"""Bytes that are decompressed at a time, so that what stands before the damage is still had."""
LONG, MOST_BREAKS = 2**20, 2
"""LZMA is slow, and gains nothing on long streams of many planes, most of which are noise."""
MOST_MEMBERS = 64
DATE = (0, 33)
"""Time and date of all members: the first day that a zip can name."""
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
DIRECTORY_ENTRY = struct.Struct("<4s6H3I5H2I")
DIRECTORY_END = struct.Struct("<4s4H2IH")


@dataclass(frozen=True)
class Member:
    """A member of an archive as it is written: zip method, flags, compressed bytes."""

    method: int
    flags: int
    content: bytes


def compress(data: bytes, breaks: Sequence[int] = ()) -> Member:
    """The smallest form of some bytes.

    Args:
        data: what a reader gets back.
        breaks: places where the statistics of the bytes change; deflate starts a new block there.
    """
    members = [Member(STORED, 0, data), Member(DEFLATED, 0, _deflate(data, breaks))]
    if len(breaks) <= MOST_BREAKS or len(data) < LONG:
        members += [Member(LZMA, END_MARKER, _lzma(data, filters)) for filters in LZMA_FILTERS]
    return min(members, key=lambda member: len(member.content))


def _deflate(data: bytes, breaks: Sequence[int]) -> bytes:
    written = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL + 1, strategy)
        parts, start = [], 0
        for end in sorted({b for b in breaks if 0 < b < len(data)}):
            parts += [compressor.compress(data[start:end]), compressor.flush(zlib.Z_FULL_FLUSH)]
            start = end
        written.append(b"".join([*parts, compressor.compress(data[start:]), compressor.flush()]))
    return min(written, key=len)


def _lzma(data: bytes, filters: dict) -> bytes:
    places = (filters["pb"] * 5 + filters["lp"]) * 9 + filters["lc"]
    prefix = LZMA_PREFIX.pack(LZMA_VERSION, LZMA_PROPERTIES, places, filters["dict_size"])
    return prefix + lzma.compress(data, lzma.FORMAT_RAW, filters=[filters])


def npy_header(length: int) -> bytes:
    """What stands before `length` bytes in a .npy file, without the usual padding."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({length},)}}\n".encode()
    return NPY_MAGIC + struct.pack("<H", len(text)) + text


def pack_archive(header: bytes, streams: dict[str, tuple[np.ndarray, Sequence[int]]]) -> bytes:
    """The content of a file.

    Args:
        header: of `header.json`.
        streams: uint8 arrays by name, each with the places where its statistics change. Empty ones
            are left out.
    """
    members = {HEADER: (header, ())}
    for name, (array, breaks) in streams.items():
        if len(array):
            prefix = npy_header(len(array))
            members[f"{name}.npy"] = (
                prefix + array.tobytes(),
                [len(prefix), *(len(prefix) + b for b in breaks)],
            )
    body, directory = io.BytesIO(), io.BytesIO()
    for name, (data, breaks) in members.items():
        member, offset, encoded = compress(data, breaks), body.tell(), name.encode()
        common = (member.flags, member.method, *DATE, zlib.crc32(data), len(member.content), len(data))
        version = 63 if member.method == LZMA else 20
        body.write(LOCAL_HEADER.pack(b"PK\x03\x04", version, *common, len(encoded), 0))
        body.write(encoded + member.content)
        directory.write(
            DIRECTORY_ENTRY.pack(
                b"PK\x01\x02", version, version, *common, len(encoded), 0, 0, 0, 0, 0, offset
            )
            + encoded
        )
    start, entries = body.tell(), directory.getvalue()
    end = DIRECTORY_END.pack(b"PK\x05\x06", 0, 0, len(members), len(members), len(entries), start, 0)
    return body.getvalue() + entries + end


class Archive:
    """A packed file that is open for reading; damage in it is an error that names the file."""

    def __init__(self, path: str | os.PathLike) -> None:
        """Read the file and its directory.

        Raises:
            UserError: the file is no archive, is truncated, or its directory is damaged.
        """
        self.path = Path(path)
        try:
            self.content = self.path.read_bytes()
            with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
                entries = archive.infolist()
        except Exception as error:
            # zipfile raises whatever the broken part makes it stumble over.
            raise self.damaged("its directory cannot be read") from error
        self.entries = {entry.filename.removesuffix(".npy"): entry for entry in entries}
        if len(entries) != len(self.entries) or len(entries) > MOST_MEMBERS:
            raise self.damaged("its directory names a part twice, or too many parts")
        if sum(entry.compress_size for entry in entries) > len(self.content):
            raise self.damaged("its directory promises more than the file holds")

    def damaged(self, what: str) -> UserError:
        """The error to raise for a damaged part."""
        return UserError(f"{self.path} is truncated or damaged ({what}): write or fetch it again")

    def size(self, name: str) -> int:
        """Compressed bytes of a member; 0 if there is none."""
        return self.entries[name].compress_size if name in self.entries else 0

    def header(self, limit: int) -> bytes:
        """The content of `header.json`.

        Raises:
            UserError: it is missing, damaged or longer than `limit`.
        """
        data, is_whole = self._read(HEADER, limit)
        if not is_whole:
            raise self.damaged("its header cannot be read")
        return data

    def stream(self, name: str, limit: int) -> tuple[np.ndarray, bool]:
        """The bytes of an array as far as they can be read, and whether they are all there and right.

        Args:
            name: of the stream. One that is not there is empty.
            limit: most bytes that it can have.
        """
        if name not in self.entries:
            return np.zeros(0, np.uint8), True
        data, is_whole = self._read(f"{name}.npy", limit + len(npy_header(limit)))
        start = len(NPY_MAGIC) + 2 + int.from_bytes(data[len(NPY_MAGIC) : len(NPY_MAGIC) + 2], "little")
        array = np.frombuffer(data, np.uint8)[start:]
        return array, is_whole and data[:start] == npy_header(len(array))

    def _read(self, name: str, limit: int) -> tuple[bytes, bool]:
        entry = self.entries.get(name.removesuffix(".npy"))
        if entry is None or entry.filename != name:
            raise self.damaged(f"it has no {name}")
        compressed = self._compressed(entry)
        data = b""
        if compressed is not None:
            data = _decompress(entry.compress_type, compressed, limit)
        return data, len(data) == entry.file_size and zlib.crc32(data) == entry.CRC

    def _compressed(self, entry: zipfile.ZipInfo) -> bytes | None:
        start = entry.header_offset + LOCAL_HEADER.size
        if entry.header_offset < 0 or start > len(self.content):
            return None
        magic, *_, name_length, extra_length = LOCAL_HEADER.unpack(self.content[entry.header_offset : start])
        if magic != b"PK\x03\x04":
            return None
        start += name_length + extra_length
        compressed = self.content[start : start + entry.compress_size]
        return compressed if len(compressed) == entry.compress_size else None


def _decompress(method: int, compressed: bytes, limit: int) -> bytes:
    """At most `limit` bytes and one more; less if the data are damaged."""
    if method == STORED:
        return compressed[: limit + 1]
    parts, done, waiting = [], 0, compressed
    try:
        if method == DEFLATED:
            decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
        elif method == LZMA:
            version, length, places, size = LZMA_PREFIX.unpack_from(compressed)
            if (version, length) != (LZMA_VERSION, LZMA_PROPERTIES) or size > LARGEST_DICTIONARY:
                return b""
            (lp, lc), pb = divmod(places % 45, 9), places // 45
            filters = {"id": lzma.FILTER_LZMA1, "dict_size": size, "lc": lc, "lp": lp, "pb": pb}
            decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[filters])
            waiting = compressed[LZMA_PREFIX.size :]
        else:
            return b""
        while done <= limit and not decompressor.eof:
            part = decompressor.decompress(waiting, min(CHUNK, limit + 1 - done))
            waiting = decompressor.unconsumed_tail if method == DEFLATED else b""
            if not part and (method == DEFLATED or decompressor.needs_input) and not decompressor.eof:
                break
            parts.append(part)
            done += len(part)
    except (lzma.LZMAError, zlib.error, struct.error, ValueError):
        pass
    return b"".join(parts)
