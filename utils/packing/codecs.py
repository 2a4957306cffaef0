"""Turns tensors into streams of bytes that compress well, and back, bit for bit.

Two steps, both lossless:

- Zeros. A tensor is stored dense, or as its nonzero values and their positions: a bit mask (one bit per
  weight) or gaps (the number of zeros before each value; 255 means 255 zeros and no value). Whichever of
  the three has the fewest Huffman-coded bytes is used.
- Planes. Bytes of the same significance are stored together, the most significant first: the exponents
  of floats are much alike, while the low bits of a mantissa are noise. A float is first rotated by one
  bit, which moves its sign to the end; the sign of an int32 is moved there too (zigzag).

-0.0 counts as a value, not as a zero, and is restored.
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
    """Return the bytes (itemsize, n) of float16, float32, int8 or int32 values, most significant first."""
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
    """Return the positions of the kept values; the inverse of `to_gaps`."""
    ends = np.cumsum(np.where(gaps == LONGEST_GAP, LONGEST_GAP, gaps.astype(np.int64) + 1))
    return ends[gaps != LONGEST_GAP] - 1


def huffman_size(data: np.ndarray) -> int:
    """Return the size in bytes of Huffman-coded data: deflate without a search for repetitions."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL + 1, zlib.Z_HUFFMAN_ONLY)
    return len(coder.compress(np.ascontiguousarray(data).tobytes()) + coder.flush())


def planes_size(values: np.ndarray) -> int:
    """Return the `huffman_size` of all planes, each with its own frequencies."""
    return sum(map(huffman_size, to_planes(values))) if values.size else 0


def choose(values: np.ndarray) -> str:
    """Return the encoding that makes a tensor smallest: DENSE, MASK or GAPS."""
    kept = is_kept(values)
    sparse = planes_size(values.reshape(-1)[kept])
    costs = {
        DENSE: planes_size(values),
        MASK: sparse + huffman_size(np.packbits(kept)),
        GAPS: sparse + huffman_size(to_gaps(kept)),
    }
    return min(costs, key=costs.__getitem__)


def split_zeros(
    values: np.ndarray, sizes: Sequence[int], encodings: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the streams `mask` and `gaps`, and the values to store.

    The tensors of each encoding are joined into one long tensor, so that no counts need to be stored.

    Args:
        values: values of all tensors, one tensor after the other.
        sizes: number of values of each tensor.
        encodings: DENSE, MASK or GAPS for each tensor.
    """
    kept, is_masked, has_gaps = is_kept(values), *_encoded_as((MASK, GAPS), sizes, encodings)
    stored = kept | ~(is_masked | has_gaps)
    return np.packbits(kept[is_masked]), to_gaps(kept[has_gaps]), values[stored]


def find_values(
    mask: np.ndarray, gaps: np.ndarray, sizes: Sequence[int], encodings: Sequence[str]
) -> np.ndarray:
    """Return which values of all tensors are stored; the others are zero.

    Args:
        mask, gaps: streams from `split_zeros`.
        sizes, encodings: as for `split_zeros`.

    Raises:
        ValueError, IndexError: the encodings, `mask` or `gaps` do not fit the tensors.
    """
    if len(encodings) != len(sizes) or set(encodings) - {DENSE, MASK, GAPS}:
        raise ValueError(f"it has other encodings than one of {DENSE}, {MASK}, {GAPS} for each tensor")
    is_masked, has_gaps = _encoded_as((MASK, GAPS), sizes, encodings)
    stored = ~(is_masked | has_gaps)
    count = np.count_nonzero(is_masked)
    if len(mask) != -(-count // 8):
        raise ValueError(f"the mask has {len(mask)} bytes for {count} weights")
    bits = np.unpackbits(mask)
    if bits[count:].any():
        raise ValueError("the mask has bits that belong to no weight")
    stored[is_masked] = bits[:count]
    stored[np.flatnonzero(has_gaps)[from_gaps(gaps)]] = True
    return stored


def _encoded_as(kinds: Sequence[str], sizes: Sequence[int], encodings: Sequence[str]) -> list[np.ndarray]:
    """Return, for each kind, which values belong to a tensor of that encoding."""
    return [np.repeat([encoding == kind for encoding in encodings], sizes) for kind in kinds]
