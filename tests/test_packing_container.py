"""The archive of packed files: others can open it, and it cannot be made to take memory."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from utils.common.errors import UserError
from utils.packing.container import HEADER, LONGEST_NPY_HEADER, Archive, reading, write_archive

DATA_START = 30 + len(HEADER)
"""Where the content of the first member begins: after its local header and its name."""


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "noise": random.integers(0, 256, 3000, dtype=np.uint8),
        "zeros": np.zeros(5000, np.uint8),
        "few": (random.random(20000) < 0.1).astype(np.uint8),
        "empty": np.zeros(0, np.uint8),
    }


@pytest.fixture
def path(tmp_path, arrays):
    path = tmp_path / "file.packed"
    path.write_bytes(write_archive(b'{"a": 1}', arrays))
    return path


@pytest.fixture
def refused(tmp_path):
    """Write a file and give the one line with which its header, of up to 1 MB, is refused."""

    def refuse(content: bytes) -> str:
        path = tmp_path / "bad.packed"
        path.write_bytes(content)
        with pytest.raises(UserError, match="is truncated or damaged") as caught, reading(path):
            Archive(path).read(HEADER, 2**20)
        assert len(str(caught.value).splitlines()) == 1
        assert str(path) in str(caught.value)
        return str(caught.value)

    return refuse


def archive_of(header: bytes, method: int) -> bytes:
    """An archive whose only member is header.json."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", method) as archive:
        archive.writestr(HEADER, header)
    return written.getvalue()


def test_numpy_and_zipfile_open_it(path, arrays):
    with np.load(path) as archive:
        assert archive[HEADER] == b'{"a": 1}'
        for name in ("noise", "zeros", "few"):
            assert np.array_equal(archive[name], arrays[name])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [HEADER, "noise.npy", "zeros.npy", "few.npy"]


def test_everything_comes_back(path, arrays):
    archive = Archive(path)
    assert archive.read(HEADER, 100) == b'{"a": 1}'
    for name, array in arrays.items():
        assert np.array_equal(archive.array(name, len(array)), array)


def test_each_member_takes_the_smallest_method(tmp_path):
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, 400_000, dtype=np.uint8)
    arrays = {
        "noise": noise,
        "repeated": np.tile(noise[:4000], 50),
        "bits": (random.random(200_000) < 0.1).astype(np.uint8),
        "zeros": np.zeros(300, np.uint8),
    }
    path = tmp_path / "file.packed"
    path.write_bytes(write_archive(b"{}", arrays))
    entries = Archive(path).entries
    assert {name: entry.compress_type for name, entry in entries.items()} == {
        HEADER: zipfile.ZIP_STORED,
        "noise": zipfile.ZIP_STORED,
        "repeated": zipfile.ZIP_LZMA,
        "bits": zipfile.ZIP_LZMA,
        "zeros": zipfile.ZIP_DEFLATED,
    }
    entropy = -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9)) / 8
    assert entries["bits"].compress_size < 1.35 * entropy * 200_000


def test_planes_are_counted_together(tmp_path):
    path = tmp_path / "file.packed"
    zeros = np.zeros(500, np.uint8)
    path.write_bytes(write_archive(b"{}", {"values.0": zeros, "values.1": zeros, "values2": zeros}))
    archive = Archive(path)
    assert archive.size("values") == 2 * archive.size("values2") == 2 * archive.size("values.0") > 0
    assert archive.size("scales") == 0


def test_equal_content_gives_equal_bytes_on_every_system(arrays, monkeypatch):
    content = write_archive(b"{}", arrays)
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert write_archive(b"{}", arrays) == content


def test_a_limit_is_held(path):
    archive = Archive(path)
    assert len(archive.array("zeros", 5000)) == 5000
    with pytest.raises(ValueError, match="zeros has"):
        archive.array("zeros", 4999)
    with pytest.raises(ValueError, match=r"header\.json has"):
        archive.read(HEADER, 3)


@pytest.mark.parametrize("array", [np.zeros(1, np.uint8), np.zeros(10**8, np.uint8)])
def test_the_header_of_an_array_is_as_long_as_assumed(array):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    assert file.tell() == LONGEST_NPY_HEADER


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("size", [60 * 2**20, 1000], ids=["true_size", "false_size"])
def test_a_decompression_bomb_takes_no_memory(refused, method, size):
    """60 MB of spaces, whether the directory says so or not."""
    content = archive_of(b" " * (60 * 2**20), method)
    assert len(content) < 400_000
    content = content.replace(struct.pack("<I", 60 * 2**20), struct.pack("<I", size))
    tracemalloc.start()
    try:
        refused(content)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_huge_lzma_dictionary_is_refused_before_it_is_allocated(tmp_path, refused):
    content = bytearray(archive_of(b" " * 2000, zipfile.ZIP_LZMA))
    path = tmp_path / "good.packed"
    for size in (2**16, 2**20, 2**24):
        struct.pack_into("<I", content, DATA_START + 5, size)
        path.write_bytes(content)
        assert Archive(path).read(HEADER, 2000) == b" " * 2000
    for size in (2**25, 2**30, 2**32 - 1):
        struct.pack_into("<I", content, DATA_START + 5, size)
        assert "Memory usage limit exceeded" in refused(bytes(content))


def test_other_methods_are_refused(refused):
    assert "compression method 12" in refused(archive_of(b"{}", zipfile.ZIP_BZIP2))
    encrypted = bytearray(archive_of(b"{}", zipfile.ZIP_STORED))
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    assert "encrypted" in refused(bytes(encrypted))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip at all" * 10])
def test_what_is_no_archive(refused, content):
    refused(content)


@pytest.mark.parametrize("offset", [0, 3, 9, DATA_START, DATA_START + 4])
def test_a_short_member(tmp_path, refused, offset):
    """Its local header or its content is cut, though the directory is whole."""
    content = archive_of(b" " * 2000, zipfile.ZIP_LZMA)
    start = content.index(b"PK\x01\x02")
    refused(content[:offset] + content[start:])


def test_a_name_that_comes_twice(tmp_path, refused):
    path = tmp_path / "twice.packed"
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "w") as archive:
        archive.writestr(HEADER, "{}")
        archive.writestr(HEADER, "[]")
    assert "names a member twice" in refused(path.read_bytes())
