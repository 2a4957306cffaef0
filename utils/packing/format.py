"""The format of packed files: a JSON header, and one stream for all tensors of a kind.

Members of the archive (utils/packing/container.py; all arrays are bytes):

    header.json    format, version, what the model is, the encoding of each weight ("encodings": one letter
                   per layer in forward order, d dense, m mask, g gaps) and the type of each stream ("types")
    mask           one bit per weight of the layers with m: whether it is not zero; first bit highest
    gaps           the number of zeros before each value of the layers with g; 255 means 255 zeros, no value
    values         all weights of the layers with d, the nonzero weights of the others
    scales, biases, batch_norm, ranges    all values

A stream of numbers is stored as planes: `values.0` holds the most significant byte of each number,
`values.1` the next (utils/packing/codecs.py says where the sign goes). Names and shapes are not stored:
they are those of MobileNetV2 with the header's architecture, in the order of its state_dict.

Version 2 stored the planes of a stream one after the other in a single array, and two bytes of CRC-32 per
tensor in `checksums`, which are ignored: the zip has a CRC-32 for each array.

A file is not trusted: shapes come from the architecture, the model may not be too large for the size of
the file, and nothing longer than its tensors is decompressed.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from utils.common.errors import UserError
from utils.packing.codecs import choose, find_values, from_planes, split_zeros, to_planes
from utils.packing.container import HEADER, Archive, write_archive

FORMAT = "mobilenetv2-packed"
FORMAT_VERSION = 3
JOINED_PLANES_VERSION = 2
STREAMS = ("values", "scales", "biases", "batch_norm", "ranges")
"""The streams of numbers."""
LARGEST_HEADER = 2**20
FREE_BYTES, LARGEST_RATIO = 2**26, 64
"""Tensors may take FREE_BYTES plus LARGEST_RATIO times the size of the file."""


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
        members = [slot for slot in slots if slot.stream == stream]
        for slot in members:
            if tensors[slot.name].dtype.kind == "f" and not np.isfinite(tensors[slot.name]).all():
                raise UserError(
                    f"{slot.name} holds NaN or infinity and is not packed: the training had diverged"
                )
        if not members:
            continue
        parts = [tensors[slot.name].reshape(-1) for slot in members]
        values = np.concatenate(parts)
        types[stream] = values.dtype.name
        if stream == "values":
            encodings = "".join(map(choose, parts))
            streams["mask"], streams["gaps"], values = split_zeros(values, list(map(len, parts)), encodings)
            header = {**header, "encodings": encodings}
        streams |= {f"{stream}.{index}": plane for index, plane in enumerate(to_planes(values))}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, **header, "types": types}
    return write_archive(json.dumps(header, separators=(",", ":")).encode(), streams)


def is_packed(path: str | os.PathLike) -> bool:
    """Return whether a file starts like a packed file; the rest may be damaged."""
    try:
        with open(path, "rb") as file:
            start = file.read(30 + len(HEADER))
    except OSError:
        return False
    return start.startswith(b"PK\x03\x04") and start.endswith(HEADER.encode())


class PackedFile:
    """A packed file that is open for reading; open and read it within `reading`.

    `header` is its JSON header, of which only format and version have been checked.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Read the header.

        Raises:
            UserError: the file is foreign or of another version.
            ValueError, KeyError, ...: it is truncated or damaged.
        """
        self.archive = Archive(path)
        self.header: dict[str, Any] = json.loads(self.archive.read(HEADER, LARGEST_HEADER))
        found, version = self.header["format"], self.header["format_version"]
        if found != FORMAT:
            raise UserError(
                f"{path} has format {found!r}, not {FORMAT}: give a file of scripts/pack_weights.py"
            )
        if version not in (JOINED_PLANES_VERSION, FORMAT_VERSION):
            raise UserError(
                f"{path} has format version {version!r}, this program reads {JOINED_PLANES_VERSION} "
                f"and {FORMAT_VERSION}: use the release that wrote it"
            )

    def read(self, slots: Sequence[Slot], types: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
        """Return the tensors by name.

        Args:
            slots: as they were given to `encode`.
            types: names of the allowed types by stream.

        Raises:
            ValueError, KeyError, ...: the file is damaged or does not hold these tensors.
        """
        by_stream = {stream: [slot for slot in slots if slot.stream == stream] for stream in STREAMS}
        by_stream = {stream: members for stream, members in by_stream.items() if members}
        if set(self.header["types"]) != set(by_stream):
            raise ValueError("it has other streams")
        dtypes = {stream: self.header["types"][stream] for stream in by_stream}
        if any(dtype not in types[stream] for stream, dtype in dtypes.items()):
            raise ValueError(f"its streams have the types {dtypes}")
        size = sum(slot.size * np.dtype(dtypes[slot.stream]).itemsize for slot in slots)
        if size > FREE_BYTES + LARGEST_RATIO * len(self.archive.content):
            raise ValueError(f"it is too small for {size} bytes of tensors")
        planes = {stream: self._planes(stream, np.dtype(dtype)) for stream, dtype in dtypes.items()}
        known = {HEADER, "mask", "gaps", *chain(*planes.values())}
        if self.header["format_version"] == JOINED_PLANES_VERSION:
            known.add("checksums")
        if set(self.archive.entries) - known:
            raise ValueError("it has members that belong to nothing")

        tensors: dict[str, np.ndarray] = {}
        for stream, members in by_stream.items():
            sizes = [slot.size for slot in members]
            values = np.zeros(sum(sizes), dtypes[stream])
            stored = np.ones(len(values), bool)
            if stream == "values":
                mask, gaps = (self.archive.array(name, len(values)) for name in ("mask", "gaps"))
                stored = find_values(mask, gaps, sizes, self.header["encodings"])
            values[stored] = self._numbers(stream, int(np.count_nonzero(stored)), values.dtype)
            parts = np.split(values, np.cumsum(sizes)[:-1])
            tensors |= {s.name: part.reshape(s.shape) for s, part in zip(members, parts, strict=True)}
        return tensors

    def _planes(self, stream: str, dtype: np.dtype) -> list[str]:
        """Return the names of the arrays that hold a stream."""
        is_joined = self.header["format_version"] == JOINED_PLANES_VERSION
        return [stream] if is_joined else [f"{stream}.{index}" for index in range(dtype.itemsize)]

    def _numbers(self, stream: str, count: int, dtype: np.dtype) -> np.ndarray:
        """Return the values (count,) of a stream."""
        planes = self._planes(stream, dtype)
        data = np.concatenate([self.archive.array(name, count * dtype.itemsize) for name in planes])
        values = from_planes(data.reshape(dtype.itemsize, count), dtype)
        if dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"{stream} holds NaN or infinity")
        return values
