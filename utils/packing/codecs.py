"""Tensors as streams of bytes that compress well, and back bit for bit.

Two steps, neither of which loses anything:

- Zeros. Of a tensor in which zeros are many, the values that are not zero are kept, and where they
  are: as a bit mask (one bit a weight) or as gaps (zeros in front of each value; 255 means 255 zeros
  and no value). Which of the three is smallest is estimated by Huffman coding its bytes.
- Planes. The bytes of like weight of all numbers of a stream stand together, the most significant
  ones first: exponents of floats are much alike, the end of a mantissa is noise. A float is turned by
  one bit first, so that its sign stands last; an int32 has its sign moved there too (zigzag).

Many zeros are meant: -0.0 is no zero here, and comes back as it was.
"""

import zlib
from collections.abc import Sequence

import numpy as np

DENSE, MASK, GAPS = "d", "m", "g"
LONGEST_GAP = 255


def is_kept(values: np.ndarray) -> np.ndarray:
    """Which values are not zero; -0.0 counts as a value."""
    return as_integers(values) != 0


def as_integers(values: np.ndarray) -> np.ndarray:
    """The bits of each value as an unsigned integer, flat."""
    return np.ascontiguousarray(values).reshape(-1).view(f"u{values.itemsize}")


def to_planes(values: np.ndarray) -> np.ndarray:
    """Bytes (itemsize, n), the most significant ones first, of float16, float32, int8 or int32."""
    bits, last = as_integers(values), 8 * values.itemsize - 1
    if values.dtype.kind == "f":
        bits = (bits << 1) | (bits >> last)
    elif values.itemsize > 1:
        bits = (bits << 1) ^ (values.reshape(-1) >> last).view(bits.dtype)
    return bits.astype(f">u{values.itemsize}").view(np.uint8).reshape(len(bits), values.itemsize).T


def from_planes(planes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The reverse of `to_planes`: values (n,)."""
    bits = np.ascontiguousarray(planes.T).view(f">u{dtype.itemsize}").reshape(-1).astype(f"u{dtype.itemsize}")
    last = 8 * dtype.itemsize - 1
    if dtype.kind == "f":
        bits = (bits >> 1) | (bits << last)
    elif dtype.itemsize > 1:
        bits = (bits >> 1) ^ (0 - (bits & 1))
    return bits.view(dtype)


def to_gaps(kept: np.ndarray) -> np.ndarray:
    """The zeros in front of each kept value, as bytes; `kept` is a flat array of booleans."""
    gaps = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    longest = gaps // LONGEST_GAP
    encoded = np.full(len(gaps) + longest.sum(), LONGEST_GAP, np.uint8)
    encoded[np.arange(len(gaps)) + np.cumsum(longest)] = gaps % LONGEST_GAP
    return encoded


def from_gaps(gaps: np.ndarray) -> np.ndarray:
    """Places of the kept values."""
    ends = np.cumsum(np.where(gaps == LONGEST_GAP, LONGEST_GAP, gaps.astype(np.int64) + 1))
    return ends[gaps != LONGEST_GAP] - 1


def huffman_size(data: np.ndarray) -> int:
    """Bytes that deflate takes for some bytes if it looks at nothing but how often each comes."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL + 1, zlib.Z_HUFFMAN_ONLY)
    return len(coder.compress(np.ascontiguousarray(data).tobytes()) + coder.flush())


def planes_size(values: np.ndarray) -> int:
    """`huffman_size` of all planes, each with its own frequencies."""
    return sum(map(huffman_size, to_planes(values))) if values.size else 0


def choose(values: np.ndarray) -> str:
    """DENSE, MASK or GAPS: with which of them the tensor is smallest."""
    kept = is_kept(values)
    sparse = planes_size(values.reshape(-1)[kept])
    costs = {
        DENSE: planes_size(values),
        MASK: sparse + huffman_size(np.packbits(kept)),
        GAPS: sparse + huffman_size(to_gaps(kept)),
    }
    return min(costs, key=costs.__getitem__)


class Places:
    """Where the values of sparse tensors are: the streams `mask` and `gaps`, shared by all of them.

    The tensors of each kind are joined to one long one, so that no count is needed.
    """

    def __init__(self, mask: np.ndarray, gaps: np.ndarray) -> None:
        self.bits = np.unpackbits(mask)
        self.places = from_gaps(gaps)
        self.taken = {MASK: 0, GAPS: 0}

    def take(self, encoding: str, size: int) -> np.ndarray:
        """Places of the values of the next tensor, counted from its start."""
        start = self.taken[encoding]
        self.taken[encoding] = end = start + size
        if encoding == MASK:
            return np.flatnonzero(self.bits[start:end])
        first, behind = np.searchsorted(self.places, (start, end))
        return self.places[first:behind] - start

    def are_used_up(self) -> bool:
        """Whether nothing is left but the bits that fill the last byte of the mask."""
        rest = self.bits[self.taken[MASK] :]
        last = self.places[-1] if len(self.places) else -1
        return len(rest) < 8 and not rest.any() and last < self.taken[GAPS]


def join_places(tensors: Sequence[np.ndarray], encodings: str) -> tuple[np.ndarray, np.ndarray]:
    """The streams `mask` and `gaps` of tensors with these encodings."""
    joined = {}
    for kind in (MASK, GAPS):
        parts = [is_kept(t) for t, encoding in zip(tensors, encodings, strict=True) if encoding == kind]
        joined[kind] = np.concatenate(parts) if parts else np.zeros(0, bool)
    return np.packbits(joined[MASK]), to_gaps(joined[GAPS])
