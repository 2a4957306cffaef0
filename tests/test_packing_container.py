"""The archive of packed files: others can open it, and it cannot be made to take memory."""

import io
import lzma
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from utils.common.errors import UserError
from utils.packing import container as packing_container
from utils.packing.container import HEADER, Archive, compress, pack_archive


@pytest.fixture
def streams() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "noise": random.integers(0, 256, 3000, dtype=np.uint8),
        "zeros": np.zeros(5000, np.uint8),
        "few": (random.random(20000) < 0.1).astype(np.uint8),
        "empty": np.zeros(0, np.uint8),
    }


@pytest.fixture
def path(tmp_path, streams):
    path = tmp_path / "file.packed"
    path.write_bytes(pack_archive(b'{"a": 1}', {name: (array, ()) for name, array in streams.items()}))
    return path


def test_numpy_and_zipfile_open_it(path, streams):
    with np.load(path) as archive:
        assert archive[HEADER] == b'{"a": 1}'
        for name in ("noise", "zeros", "few"):
            assert np.array_equal(archive[name], streams[name])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [HEADER, "noise.npy", "zeros.npy", "few.npy"]


def test_everything_comes_back(path, streams):
    archive = Archive(path)
    assert archive.header(100) == b'{"a": 1}'
    for name, array in streams.items():
        found, is_whole = archive.stream(name, len(array))
        assert is_whole
        assert np.array_equal(found, array)


def test_each_member_takes_the_smallest_method():
    random = np.random.default_rng(0)
    noise, repeated = random.bytes(4000), random.bytes(2000) * 50
    assert compress(noise).method == zipfile.ZIP_STORED
    assert compress(b"").method == zipfile.ZIP_STORED
    assert compress(repeated).method == zipfile.ZIP_LZMA
    mask = np.packbits(random.random(200_000) < 0.1).tobytes()
    assert compress(mask).method == zipfile.ZIP_DEFLATED
    # By frequency alone, since matches only cost where there are none.
    assert len(compress(mask).content) < 0.95 * len(zlib.compress(mask, 9))


def test_planes_are_deflated_with_tables_of_their_own():
    random = np.random.default_rng(0)
    planes = [random.integers(low, low + 8, 2000, dtype=np.uint8).tobytes() for low in (0, 200)]
    joined = b"".join(planes)
    together, apart = (len(packing_container._deflate(joined, breaks)) for breaks in ((), (2000,)))
    assert apart < 0.85 * together
    assert zlib.decompress(packing_container._deflate(joined, (2000,)), -15) == joined


def test_a_limit_is_held(path, streams):
    found, is_whole = Archive(path).stream("zeros", 1000)
    assert not is_whole
    assert len(found) <= 1002
    with pytest.raises(UserError, match="header cannot be read"):
        Archive(path).header(3)


def bomb(method: int) -> bytes:
    """An archive whose header.json is 60 MB of spaces."""
    written = io.BytesIO()
    with (
        zipfile.ZipFile(written, "w", method) as archive,
        archive.open(HEADER, "w", force_zip64=True) as member,
    ):
        for _ in range(60):
            member.write(b" " * 2**20)
    return written.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_decompression_bomb_takes_no_memory(tmp_path, method):
    path = tmp_path / "bomb.packed"
    path.write_bytes(bomb(method))
    assert path.stat().st_size < 400_000
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="header cannot be read"):
            Archive(path).header(2**20)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_huge_lzma_dictionary_is_refused():
    filters = {"id": lzma.FILTER_LZMA1, "preset": 0, "dict_size": 2**30}
    data = lzma.compress(b"{}", lzma.FORMAT_RAW, filters=[{**filters, "dict_size": 2**16}])
    content = struct.pack("<2sHBI", b"\x09\x04", 5, 93, filters["dict_size"]) + data
    assert packing_container._decompress(zipfile.ZIP_LZMA, content, 100) == b""
    small = struct.pack("<2sHBI", b"\x09\x04", 5, 93, 2**16) + data
    assert packing_container._decompress(zipfile.ZIP_LZMA, small, 100) == b"{}"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip at all" * 10])
def test_what_is_no_archive(tmp_path, content):
    path = tmp_path / "bad.packed"
    path.write_bytes(content)
    with pytest.raises(UserError, match="its directory cannot be read"):
        Archive(path)


def test_a_name_that_comes_twice(tmp_path):
    path = tmp_path / "twice.packed"
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "w") as archive:
        archive.writestr(HEADER, "{}")
        archive.writestr(HEADER, "[]")
    with pytest.raises(UserError, match="names a part twice"):
        Archive(path)


def test_equal_content_gives_equal_bytes(streams):
    arguments = b"{}", {name: (array, ()) for name, array in streams.items()}
    assert pack_archive(*arguments) == pack_archive(*arguments)
