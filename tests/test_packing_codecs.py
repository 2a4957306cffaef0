"""Streams of bytes that stand for tensors: nothing may be lost, whatever the tensor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.packing.codecs import (
    DENSE,
    GAPS,
    MASK,
    choose,
    find_values,
    from_gaps,
    from_planes,
    huffman_size,
    is_kept,
    split_zeros,
    to_gaps,
    to_planes,
)

DTYPES = ("float32", "float16", "int8", "int32")


@st.composite
def tensors(draw) -> np.ndarray:
    """Any shape, empty ones too; any type, any bits; any density from none to all."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits = random.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8).view(dtype)
    density = draw(st.sampled_from((0.0, 0.01, 0.1, 0.27, 0.5, 0.9, 1.0)))
    return np.where(random.random(len(bits)) < density, bits, dtype.type(0)).reshape(shape)


@given(tensors())
@settings(max_examples=300, deadline=None)
def test_planes_come_back_bit_for_bit(tensor):
    planes = to_planes(tensor)
    assert planes.shape == (tensor.itemsize, tensor.size)
    assert from_planes(planes, tensor.dtype).tobytes() == tensor.tobytes()


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int32", [0, 1, -1, 2**31 - 1, -(2**31)]),
        ("int8", [0, 127, -128]),
        ("float32", [0.0, -0.0, 1e-45, np.inf, -np.inf, np.nan]),
        ("float16", [0.0, -0.0, 65504.0, 6e-8]),
    ],
)
def test_the_ends_of_each_type_come_back(dtype, values):
    array = np.array(values, dtype)
    assert from_planes(to_planes(array), array.dtype).tobytes() == array.tobytes()


def test_the_first_plane_of_floats_is_the_exponent_and_the_last_bit_the_sign():
    planes = to_planes(np.array([1.0, -1.5], np.float32))
    assert planes[0].tolist() == [127, 127]
    assert (planes[-1] & 1).tolist() == [0, 1]


@given(st.lists(st.booleans(), max_size=600), st.sampled_from((1, 254, 255, 256, 1000)))
@settings(max_examples=200, deadline=None)
def test_gaps_of_any_length_come_back(bits, stretch):
    kept = np.zeros(len(bits) * stretch, bool)
    kept[::stretch] = bits
    assert from_gaps(to_gaps(kept)).tolist() == np.flatnonzero(kept).tolist()


@given(
    st.lists(st.tuples(tensors(), st.sampled_from((DENSE, MASK, GAPS))), min_size=1, max_size=6),
    st.sampled_from(DTYPES),
)
@settings(max_examples=200, deadline=None)
def test_tensors_that_share_streams_get_their_own_values(chosen, dtype):
    arrays = [is_kept(array).astype(dtype) for array, _ in chosen]
    sizes, encodings = [len(array) for array in arrays], "".join(encoding for _, encoding in chosen)
    joined = np.concatenate(arrays)
    mask, gaps, values = split_zeros(joined, sizes, encodings)
    stored = find_values(mask, gaps, sizes, encodings)
    assert len(values) == np.count_nonzero(stored)
    restored = np.zeros_like(joined)
    restored[stored] = values
    assert np.array_equal(restored, joined)
    for part, array, encoding in zip(np.split(stored, np.cumsum(sizes)[:-1]), arrays, encodings, strict=True):
        assert part.all() if encoding == DENSE else np.array_equal(part, array != 0)


def test_masks_and_gaps_that_do_not_fit_are_noticed():
    with pytest.raises(ValueError):
        find_values(np.zeros(1, np.uint8), np.zeros(0, np.uint8), [9], MASK)
    with pytest.raises(IndexError):
        find_values(np.zeros(0, np.uint8), np.full(1, 3, np.uint8), [3], GAPS)
    with pytest.raises(ValueError, match="belong to no weight"):
        find_values(np.array([0b11100001], np.uint8), np.zeros(0, np.uint8), [3], MASK)


def test_each_tensor_takes_what_is_smallest_for_it():
    random = np.random.default_rng(0)
    values = random.integers(1, 127, 40000).astype(np.int8)
    found = {
        density: choose(np.where(random.random(len(values)) < density, values, np.int8(0)))
        for density in (0.0, 0.02, 0.5, 1.0)
    }
    assert found[1.0] == DENSE
    assert found[0.5] == MASK
    assert found[0.02] == GAPS
    for encoding in (DENSE, MASK, GAPS):
        assert choose(np.zeros(0, np.float32)) in (DENSE, MASK, GAPS), encoding


def test_negative_zero_is_a_value():
    assert is_kept(np.array([0.0, -0.0, 1.0], np.float32)).tolist() == [False, True, True]


def test_few_levels_take_few_bits():
    random = np.random.default_rng(0)
    levels = (random.normal(size=200_000) * 2.5).round().clip(-7, 8).astype(np.int8)
    counts = np.unique(levels, return_counts=True)[1]
    entropy = (counts * np.log2(counts.sum() / counts)).sum() / 8
    assert huffman_size(to_planes(levels)) < 1.03 * entropy
