"""Packed files: a JSON header, and one stream for all tensors of a kind.

Members of the archive (utils/packing/container.py; all arrays are bytes):

    header.json    format, version, what the model is, the encoding of each weight ("encodings": one letter
                   per layer in forward order, d dense, m mask, g gaps) and the type of each stream ("types")
    mask           one bit per weight of the layers with m: whether it is not zero; first bit highest
    gaps           the number of zeros before each value of the layers with g; 255 is 255 zeros and no value
    values         all weights of the layers with d, and the nonzero weights of the others
    scales, biases, batch_norm, ranges    always dense

A stream of numbers is stored as planes: `values.0` holds the most significant byte of each number,
`values.1` the next (utils/packing/codecs.py says where a sign goes). Names and shapes are not stored: they
are those of MobileNetV2 with the header's architecture, in the order of its state_dict.

Version 2 stored the planes of a stream one after the other in one array, and two bytes of CRC-32 per
tensor in `checksums`, which are ignored: the zip has a CRC-32 for each array.

A file is not trusted: shapes come from the architecture, whose size is limited in proportion to the size
of the file, and they limit what is decompressed.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.common.errors import UserError, one_line
from utils.packing.codecs import DENSE, GAPS, MASK, Places, choose, from_planes, join_places, to_planes
from utils.packing.container import HEADER, Archive, write_archive

FORMAT = "mobilenetv2-packed"
FORMAT_VERSION = 3
JOINED_PLANES_VERSION = 2
STREAMS = ("values", "scales", "biases", "batch_norm", "ranges")
"""The streams of numbers."""
LARGEST_HEADER = 2**20
FREE_BYTES, LARGEST_RATIO = 2**26, 64
"""Tensors may take FREE_BYTES plus LARGEST_RATIO times the size of the file."""
ARCHITECTURE_ERRORS = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)
"""What torch raises for an invalid architecture."""


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a packed file.

    Args:
        name: in the state_dict, or as the int8 model calls it.
        layer: convolution or linear layer that it belongs to; empty if it belongs to none.
        stream: one of STREAMS.
        shape: of the tensor.
    """

    name: str
    layer: str
    stream: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return the number of values."""
        return math.prod(self.shape)


def encode(header: dict[str, Any], slots: Sequence[Slot], tensors: dict[str, np.ndarray]) -> bytes:
    """Return the content of a packed file.

    Args:
        header: what the model is; format, version, encodings and types are added.
        slots: of all tensors; those of a stream in the order in which they are read.
        tensors: by name; those of a stream have one type: float16, float32, int8 or int32.

    Raises:
        UserError: a tensor holds NaN or infinity.
    """
    types, streams = {}, {}
    for stream in STREAMS:
        arrays = {slot.name: tensors[slot.name] for slot in slots if slot.stream == stream}
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise UserError(f"{name} holds NaN or infinity and is not packed: the training had diverged")
        if not arrays:
            continue
        (dtype,) = {array.dtype for array in arrays.values()}
        types[stream] = dtype.name
        parts = [array.reshape(-1) for array in arrays.values()]
        if stream == "values":
            encodings = "".join(map(choose, parts))
            streams["mask"], streams["gaps"] = join_places(parts, encodings)
            parts = [
                part if encoding == DENSE else part[part.view(f"u{part.itemsize}") != 0]
                for part, encoding in zip(parts, encodings, strict=True)
            ]
            header = {**header, "encodings": encodings}
        planes = to_planes(np.concatenate(parts))
        streams.update(zip(_plane_names(stream, FORMAT_VERSION, len(planes)), planes, strict=True))
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, **header, "types": types}
    return write_archive(json.dumps(header, separators=(",", ":")).encode(), streams)


def _plane_names(stream: str, version: int, itemsize: int) -> list[str]:
    """Return the names of the arrays that hold the numbers of a stream."""
    return [stream] if version == JOINED_PLANES_VERSION else [f"{stream}.{i}" for i in range(itemsize)]


def is_packed(path: str | os.PathLike) -> bool:
    """Return whether a file starts like a packed file; the rest may be damaged."""
    try:
        with open(path, "rb") as file:
            start = file.read(30 + len(HEADER))
    except OSError:
        return False
    return start.startswith(b"PK\x03\x04") and start.endswith(HEADER.encode())


class PackedFile:
    """A packed file that is open for reading.

    `header` is its JSON header, of which only format and version have been checked.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Read the header.

        Raises:
            UserError: the file is truncated, damaged, foreign or of another version.
        """
        self.archive = Archive(path)
        self.path = self.archive.path
        try:
            self.header: dict[str, Any] = json.loads(self.archive.read(HEADER, LARGEST_HEADER))
            found = self.header["format"], self.header["format_version"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self.archive.damaged("its header cannot be read") from error
        if found[0] != FORMAT:
            raise UserError(
                f"{self.path} has format {found[0]!r}, not {FORMAT}: give a file of scripts/pack_weights.py"
            )
        self._version = found[1]
        if self._version not in (JOINED_PLANES_VERSION, FORMAT_VERSION):
            raise UserError(
                f"{self.path} has format version {found[1]!r}, this program reads {JOINED_PLANES_VERSION} "
                f"and {FORMAT_VERSION}: use the release that wrote it"
            )

    def wrong(self, error: object) -> UserError:
        """Return the error to raise for a header that does not fit the model."""
        return UserError(f"{self.path} does not fit MobileNetV2 ({one_line(error)[:200]}): pack it again")

    def read(self, slots: Sequence[Slot], types: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
        """Return the tensors by name.

        Args:
            slots: as they were given to `encode`.
            types: names of the allowed types by stream.

        Raises:
            UserError: the file is damaged or does not hold what it should.
        """
        by_stream = {s: [slot for slot in slots if slot.stream == s] for s in STREAMS}
        by_stream = {stream: members for stream, members in by_stream.items() if members}
        dtypes = self._dtypes(by_stream, types)
        encodings = self._encodings(by_stream)
        joined = {kind: sum(s.size for s, e in encodings.items() if e == kind) for kind in (MASK, GAPS)}
        mask = self._bytes(["mask"], -(-joined[MASK] // 8))
        places = Places(mask, self.archive.array("gaps", joined[GAPS]))

        tensors: dict[str, np.ndarray] = {}
        for stream, members in by_stream.items():
            kept = {
                slot: places.take(encoding, slot.size)
                for slot in members
                if (encoding := encodings.get(slot, DENSE)) != DENSE
            }
            counts = [len(kept[slot]) if slot in kept else slot.size for slot in members]
            values = self._numbers(stream, sum(counts), dtypes[stream])
            parts = np.split(values, np.cumsum(counts)[:-1])
            for slot, tensor in zip(members, parts, strict=True):
                if slot in kept:
                    sparse, tensor = tensor, np.zeros(slot.size, dtypes[stream])
                    tensor[kept[slot]] = sparse
                tensors[slot.name] = tensor.reshape(slot.shape)
        if not places.are_used_up():
            raise self.archive.damaged("mask or gaps are longer than the weights")
        return tensors

    def _dtypes(
        self, by_stream: dict[str, list[Slot]], types: Mapping[str, Sequence[str]]
    ) -> dict[str, np.dtype]:
        """Return the type of each stream, after checking that the file can hold tensors of that size."""
        found = self.header.get("types")
        if not isinstance(found, dict) or set(found) != set(by_stream):
            raise self.wrong("it has other streams")
        for stream in by_stream:
            if found[stream] not in types[stream]:
                raise self.wrong(f"{stream} are {found[stream]!r}")
        dtypes = {stream: np.dtype(found[stream]) for stream in by_stream}
        size = sum(slot.size * dtypes[stream].itemsize for stream in by_stream for slot in by_stream[stream])
        length = len(self.archive.content)
        if size > FREE_BYTES + LARGEST_RATIO * length:
            raise self.wrong(f"{length} bytes of file cannot hold {size} bytes of tensors")
        known = {HEADER, "mask", "gaps"}
        if self._version == JOINED_PLANES_VERSION:
            known.add("checksums")
        for stream, dtype in dtypes.items():
            known.update(_plane_names(stream, self._version, dtype.itemsize))
        if set(self.archive.entries) - known:
            raise self.wrong("it has members that belong to nothing")
        return dtypes

    def _encodings(self, by_stream: dict[str, list[Slot]]) -> dict[Slot, str]:
        found, weights = self.header.get("encodings"), by_stream["values"]
        if not isinstance(found, str) or len(found) != len(weights) or set(found) - {DENSE, MASK, GAPS}:
            raise self.wrong("it has other encodings")
        return dict(zip(weights, found, strict=True))

    def _bytes(self, names: list[str], size: int) -> np.ndarray:
        """Return the bytes (size,) of some arrays, one after the other."""
        data = np.concatenate([self.archive.array(name, size) for name in names])
        if len(data) != size:
            raise self.archive.damaged(f"{', '.join(names)}: {len(data)} bytes, not {size}")
        return data

    def _numbers(self, stream: str, count: int, dtype: np.dtype) -> np.ndarray:
        """Return the values (count,) of a stream."""
        names = _plane_names(stream, self._version, dtype.itemsize)
        planes = self._bytes(names, count * dtype.itemsize).reshape(dtype.itemsize, -1)
        values = from_planes(planes, dtype)
        if dtype.kind == "f" and not np.isfinite(values).all():
            raise self.archive.damaged(f"{stream} holds NaN or infinity")
        return values
