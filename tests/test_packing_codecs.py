"""Streams of bytes that stand for tensors: nothing may be lost, whatever the tensor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.packing.codecs import (
    DENSE,
    GAPS,
    MASK,
    Places,
    choose,
    from_gaps,
    from_planes,
    huffman_size,
    is_kept,
    join_places,
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


@given(st.lists(st.tuples(tensors(), st.sampled_from((MASK, GAPS))), max_size=6))
@settings(max_examples=200, deadline=None)
def test_tensors_that_share_streams_get_their_own_places(chosen):
    arrays, encodings = [array for array, _ in chosen], "".join(encoding for _, encoding in chosen)
    places = Places(*join_places(arrays, encodings))
    for array, encoding in chosen:
        assert places.take(encoding, array.size).tolist() == np.flatnonzero(is_kept(array)).tolist()
    assert places.are_used_up()


def test_bits_that_belong_to_nothing_are_noticed():
    mask, gaps = join_places([np.ones(3, np.int8)], MASK)
    for changed in (Places(mask | 1, gaps), Places(mask, np.zeros(1, np.uint8))):
        changed.take(MASK, 3)
        assert not changed.are_used_up()


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
