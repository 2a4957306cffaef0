"""Tensors as streams of bytes that compress well, and back bit for bit.

Two steps, both lossless:

- Zeros. If a tensor has many zeros, only the other values are kept, together with their places: as a
  bit mask (one bit per weight) or as gaps (the number of zeros before each value; 255 means 255 zeros
  and no value). The smallest of the three is chosen by the size of its Huffman-coded bytes.
- Planes. Bytes of the same significance stand together, the most significant ones first: the exponents
  of floats are much alike, the end of a mantissa is noise. A float is rotated by one bit first, so that
  its sign comes last; the sign of an int32 is moved there too (zigzag).

-0.0 is not a zero here, and comes back as it was.
"""

import zlib
from collections.abc import Sequence

import numpy as np

DENSE, MASK, GAPS = "d", "m", "g"
LONGEST_GAP = 255


def is_kept(values: np.ndarray) -> np.ndarray:
    """Return which values are not zero; -0.0 counts as a value."""
    return as_integers(values) != 0


def as_integers(values: np.ndarray) -> np.ndarray:
    """Return the bits of each value as an unsigned integer, flat."""
    return np.ascontiguousarray(values).reshape(-1).view(f"u{values.itemsize}")


def to_planes(values: np.ndarray) -> np.ndarray:
    """Return the bytes (itemsize, n) of float16, float32, int8 or int32, most significant ones first."""
    bits, last = as_integers(values), 8 * values.itemsize - 1
    if values.dtype.kind == "f":
        bits = (bits << 1) | (bits >> last)
    elif values.itemsize > 1:
        bits = (bits << 1) ^ (values.reshape(-1) >> last).view(bits.dtype)
    return bits.astype(f">u{values.itemsize}").view(np.uint8).reshape(len(bits), values.itemsize).T


def from_planes(planes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the values (n,) of planes; the inverse of `to_planes`."""
    bits = np.ascontiguousarray(planes.T).view(f">u{dtype.itemsize}").reshape(-1).astype(f"u{dtype.itemsize}")
    last = 8 * dtype.itemsize - 1
    if dtype.kind == "f":
        bits = (bits >> 1) | (bits << last)
    elif dtype.itemsize > 1:
        bits = (bits >> 1) ^ (0 - (bits & 1))
    return bits.view(dtype)


def to_gaps(kept: np.ndarray) -> np.ndarray:
    """Return the number of zeros before each kept value, as bytes; `kept` is a flat array of booleans."""
    gaps = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    longest = gaps // LONGEST_GAP
    encoded = np.full(len(gaps) + longest.sum(), LONGEST_GAP, np.uint8)
    encoded[np.arange(len(gaps)) + np.cumsum(longest)] = gaps % LONGEST_GAP
    return encoded


def from_gaps(gaps: np.ndarray) -> np.ndarray:
    """Return the places of the kept values."""
    ends = np.cumsum(np.where(gaps == LONGEST_GAP, LONGEST_GAP, gaps.astype(np.int64) + 1))
    return ends[gaps != LONGEST_GAP] - 1


def huffman_size(data: np.ndarray) -> int:
    """Return the size in bytes of data that deflate has coded by frequency alone."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL + 1, zlib.Z_HUFFMAN_ONLY)
    return len(coder.compress(np.ascontiguousarray(data).tobytes()) + coder.flush())


def planes_size(values: np.ndarray) -> int:
    """Return the `huffman_size` of all planes, each with its own frequencies."""
    return sum(map(huffman_size, to_planes(values))) if values.size else 0


def choose(values: np.ndarray) -> str:
    """Return the encoding, DENSE, MASK or GAPS, with which a tensor is smallest."""
    kept = is_kept(values)
    sparse = planes_size(values.reshape(-1)[kept])
    costs = {
        DENSE: planes_size(values),
        MASK: sparse + huffman_size(np.packbits(kept)),
        GAPS: sparse + huffman_size(to_gaps(kept)),
    }
    return min(costs, key=costs.__getitem__)


class Places:
    """The places of the values of sparse tensors: the streams `mask` and `gaps`, which all of them share.

    The tensors of each kind are joined to one long tensor, so that no count is needed.
    """

    def __init__(self, mask: np.ndarray, gaps: np.ndarray) -> None:
        self.bits = np.unpackbits(mask)
        self.places = from_gaps(gaps)
        self.taken = {MASK: 0, GAPS: 0}

    def take(self, encoding: str, size: int) -> np.ndarray:
        """Return the places of the values of the next tensor, counted from its start."""
        start = self.taken[encoding]
        self.taken[encoding] = end = start + size
        if encoding == MASK:
            return np.flatnonzero(self.bits[start:end])
        first, end_place = np.searchsorted(self.places, (start, end))
        return self.places[first:end_place] - start

    def are_used_up(self) -> bool:
        """Return whether nothing is left but the padding bits in the last byte of the mask."""
        rest = self.bits[self.taken[MASK] :]
        last = self.places[-1] if len(self.places) else -1
        return len(rest) < 8 and not rest.any() and last < self.taken[GAPS]


def join_places(tensors: Sequence[np.ndarray], encodings: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the streams `mask` and `gaps` of tensors with these encodings."""
    joined = {}
    for kind in (MASK, GAPS):
        parts = [is_kept(t) for t, encoding in zip(tensors, encodings, strict=True) if encoding == kind]
        joined[kind] = np.concatenate(parts) if parts else np.zeros(0, bool)
    return np.packbits(joined[MASK]), to_gaps(joined[GAPS])
