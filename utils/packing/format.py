"""Packed files: a header, streams that all tensors of a kind share, and a checksum for each tensor.

What is in the archive (utils/packing/container.py; all arrays are bytes):

    header.json    format, version, what the model is, the encoding of each weight ("encodings", a letter
                   a layer in forward order: d dense, m mask, g gaps) and the type of each stream ("types")
    mask           a bit for each weight of the layers with m: whether it is not zero; first bit highest
    gaps           zeros in front of each value of the layers with g; 255 is 255 zeros and no value
    values         weights: all of the layers with d, of the others those that are not zero
    scales, biases, batch_norm, ranges    all of them, always dense
    checksums      the lower two bytes of the CRC-32 of each tensor (little-endian, dense), in the order
                   of the streams: values, scales, biases, batch_norm, ranges

A stream of n numbers holds first the most significant byte of each, then the next (utils/packing/codecs.py
says how a sign is placed). Names and shapes stand nowhere: they are those of MobileNetV2 with the header's
architecture, in the order of its state_dict. Each stream has a CRC-32 in the archive as well, so two
bytes are enough to say which tensor is damaged.

A file is not believed: shapes come from the architecture, whose size must be in proportion to that of
the file, and bound what is decompressed.
"""

import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.common.errors import UserError, one_line
from utils.packing.codecs import DENSE, GAPS, MASK, Places, choose, from_planes, join_places, to_planes
from utils.packing.container import HEADER, Archive, pack_archive

FORMAT = "mobilenetv2-packed"
FORMAT_VERSION = 2
STREAMS = ("values", "scales", "biases", "batch_norm", "ranges")
"""The streams of numbers, in the order of the checksums."""
CHECKSUM_BYTES = 2
LARGEST_HEADER = 2**20
FREE_BYTES, LARGEST_RATIO = 2**26, 64
"""Tensors may take so many bytes, and so many times the size of the file on top."""
ARCHITECTURE_ERRORS = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)
"""What torch raises for an architecture that is none."""


@dataclass(frozen=True)
class Slot:
    """A tensor that a packed file has a place for.

    Args:
        name: in the state_dict, or as the int8 model calls it.
        layer: convolution or linear layer that it belongs to; empty for what belongs to all.
        stream: one of STREAMS.
        shape: of the tensor.
    """

    name: str
    layer: str
    stream: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def encode(header: dict[str, Any], slots: Sequence[Slot], tensors: dict[str, np.ndarray]) -> bytes:
    """The content of a packed file.

    Args:
        header: what the model is; format, version, encodings and types are added.
        slots: of all tensors, in an order in which each stream's are in the order of reading.
        tensors: by name; those of a stream have one type: float16, float32, int8 or int32.

    Raises:
        UserError: a tensor holds NaN or infinity.
    """
    types, streams, checksums = {}, {}, b""
    for stream in STREAMS:
        arrays = {slot.name: tensors[slot.name] for slot in slots if slot.stream == stream}
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise UserError(f"{name} holds NaN or infinity and is not packed: the training had diverged")
            checksums += checksum(array)
        if not arrays:
            continue
        (dtype,) = {array.dtype for array in arrays.values()}
        types[stream] = dtype.name
        parts = [array.reshape(-1) for array in arrays.values()]
        if stream == "values":
            encodings = "".join(map(choose, parts))
            mask, gaps = join_places(parts, encodings)
            streams.update(mask=(mask, ()), gaps=(gaps, ()))
            parts = [
                part if encoding == DENSE else part[part.view(f"u{part.itemsize}") != 0]
                for part, encoding in zip(parts, encodings, strict=True)
            ]
            header = {**header, "encodings": encodings}
        planes = to_planes(np.concatenate(parts))
        breaks = [plane * planes.shape[1] for plane in range(1, len(planes))]
        if not breaks:
            # Codes of few bits are common in one layer and rare in the next.
            breaks = np.cumsum([len(part) for part in parts]).tolist()
        streams[stream] = (planes.reshape(-1), breaks)
    streams["checksums"] = (np.frombuffer(checksums, np.uint8), ())
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, **header, "types": types}
    return pack_archive(json.dumps(header, separators=(",", ":")).encode(), streams)


def checksum(array: np.ndarray) -> bytes:
    """Of the values of a tensor."""
    little_endian = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return zlib.crc32(little_endian.tobytes()).to_bytes(4, "little")[:CHECKSUM_BYTES]


def is_packed(path: str | os.PathLike) -> bool:
    """Whether the file begins as a packed one does; it may be damaged further on."""
    try:
        with open(path, "rb") as file:
            start = file.read(30 + len(HEADER))
    except OSError:
        return False
    return start.startswith(b"PK\x03\x04") and start.endswith(HEADER.encode())


class PackedFile:
    """A packed file that is open for reading.

    `header` is what stands in it as JSON, of which only format and version are checked here.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Read the header.

        Raises:
            UserError: the file is truncated, damaged, foreign or of another version.
        """
        self.archive = Archive(path)
        self.path = self.archive.path
        self.broken: set[str] = set()
        try:
            self.header: dict[str, Any] = json.loads(self.archive.header(LARGEST_HEADER))
            found = self.header["format"], self.header["format_version"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self.archive.damaged("its header cannot be read") from error
        if found[0] != FORMAT:
            raise UserError(
                f"{self.path} has format {found[0]!r}, not {FORMAT}: give a file of scripts/pack_weights.py"
            )
        if found[1] != FORMAT_VERSION:
            raise UserError(
                f"{self.path} has format version {found[1]!r}, this program reads {FORMAT_VERSION}: use "
                "the release that wrote it"
            )

    def wrong(self, error: object) -> UserError:
        """The error to raise for a header that says what cannot be."""
        return UserError(f"{self.path} does not fit MobileNetV2 ({one_line(error)[:200]}): pack it anew")

    def read(self, slots: Sequence[Slot], types: dict[str, Sequence[str]]) -> dict[str, np.ndarray]:
        """The tensors by name.

        Args:
            slots: as they were given to `encode`.
            types: names of the types that are possible for each stream.

        Raises:
            UserError: a tensor is damaged, which is named, or the file does not hold what it should.
        """
        by_stream = {s: [slot for slot in slots if slot.stream == s] for s in STREAMS}
        by_stream = {stream: members for stream, members in by_stream.items() if members}
        dtypes = self._dtypes(by_stream, types)
        encodings = self._encodings(by_stream)
        sums = self._stream("checksums", CHECKSUM_BYTES * len(slots)).tobytes()
        joined = {kind: sum(s.size for s, e in encodings.items() if e == kind) for kind in (MASK, GAPS)}
        places = Places(self._stream("mask", -(-joined[MASK] // 8)), self._stream("gaps", joined[GAPS]))

        tensors: dict[str, np.ndarray] = {}
        for stream, members in by_stream.items():
            kept = {
                slot: places.take(encoding, slot.size)
                for slot in members
                if (encoding := encodings.get(slot, DENSE)) != DENSE
            }
            counts = [len(kept[slot]) if slot in kept else slot.size for slot in members]
            values, end = self._numbers(stream, sum(counts), dtypes[stream]), 0
            for slot, count in zip(members, counts, strict=True):
                tensor, end = values[end : end + count], end + count
                if slot in kept and len(tensor) == count:
                    sparse, tensor = tensor, np.zeros(slot.size, dtypes[stream])
                    tensor[kept[slot]] = sparse
                start = CHECKSUM_BYTES * len(tensors)
                if len(tensor) != slot.size or checksum(tensor) != sums[start : start + CHECKSUM_BYTES]:
                    raise self.archive.damaged(f"the checksum of {slot.name} is wrong")
                tensors[slot.name] = tensor.reshape(slot.shape)
            if end != len(values):
                raise self.archive.damaged(f"{stream} holds more than its tensors")
        if self.broken or not places.are_used_up():
            raise self.archive.damaged(f"{next(iter(self.broken), 'mask or gaps')} is not what was written")
        return tensors

    def _dtypes(
        self, by_stream: dict[str, list[Slot]], types: dict[str, Sequence[str]]
    ) -> dict[str, np.dtype]:
        """The type of each stream, all of them together of a size that the file can hold."""
        found = self.header.get("types")
        if not isinstance(found, dict) or set(found) != set(by_stream):
            raise self.wrong("its streams are others")
        for stream in by_stream:
            if found[stream] not in types[stream]:
                raise self.wrong(f"{stream} are {found[stream]!r}")
        dtypes = {stream: np.dtype(found[stream]) for stream in by_stream}
        size = sum(slot.size * dtypes[stream].itemsize for stream in by_stream for slot in by_stream[stream])
        length = len(self.archive.content)
        if size > FREE_BYTES + LARGEST_RATIO * length:
            raise self.wrong(f"{length} bytes of file cannot hold {size} bytes of tensors")
        if set(self.archive.entries) - {HEADER, "mask", "gaps", "checksums", *by_stream}:
            raise self.wrong("it has parts that belong to nothing")
        return dtypes

    def _encodings(self, by_stream: dict[str, list[Slot]]) -> dict[Slot, str]:
        found, weights = self.header.get("encodings"), by_stream["values"]
        if not isinstance(found, str) or len(found) != len(weights) or set(found) - {DENSE, MASK, GAPS}:
            raise self.wrong("its encodings are others")
        return dict(zip(weights, found, strict=True))

    def _stream(self, name: str, limit: int) -> np.ndarray:
        """The bytes of a stream as far as they can be read; `broken` notes those that are not whole."""
        array, is_whole = self.archive.stream(name, limit)
        if not is_whole:
            self.broken.add(name)
        return array

    def _numbers(self, stream: str, count: int, dtype: np.dtype) -> np.ndarray:
        """The values of a stream; zeros stand for what of it cannot be read."""
        data = self._stream(stream, count * dtype.itemsize)
        if stream in self.broken:
            padded = np.zeros(count * dtype.itemsize, np.uint8)
            padded[: len(data)] = data[: len(padded)]
            data = padded
        elif len(data) % dtype.itemsize:
            raise self.archive.damaged(f"{stream} ends within a number")
        return from_planes(data.reshape(dtype.itemsize, -1), dtype)
