import hashlib
import http.server
import io
import mmap
import os
import pickle
import signal
import socket
import stat
import tarfile
import threading
import time
from argparse import Namespace
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps
from torchvision.datasets import CIFAR10, ImageFolder

from tests.conftest import write_image
from utils.common import files
from utils.common.errors import UserError
from utils.data import image_file
from utils.data.datasets import (
    ImageData,
    Split,
    cifar10,
    default_val_size,
    image_folder,
    load_data,
    measure_normalization,
    notes_on_size,
    stratified_split,
)
from utils.data.image_file import read_image


def arguments(dataset, data_dir="data", image_size=None, val_size=None):
    return Namespace(dataset=dataset, data_dir=str(data_dir), image_size=image_size, val_size=val_size)


def plain(color, side=8):
    return np.full((side, side, 3), color, np.uint8)


# What is held out as val.


@pytest.mark.parametrize(
    ("train_size", "val_size"), [(50_000, 5000), (1_000_000, 5000), (49_990, 4999), (6000, 600), (180, 18)]
)
def test_default_val_size(train_size, val_size):
    assert default_val_size(train_size) == val_size


@pytest.mark.parametrize(
    ("class_sizes", "val_size", "expected"),
    [
        ((50, 30, 20), 10, [5, 3, 2]),
        ((7, 7, 6), 10, [4, 3, 3]),
        ((7, 7, 6), 0, [0, 0, 0]),
        ((1, 99), 10, [0, 10]),
        ((5000,) * 10, 5000, [500] * 10),
        ((3,) * 7, 20, [3] * 6 + [2]),
    ],
)
def test_val_is_stratified_and_apart_from_train(class_sizes, val_size, expected):
    labels = torch.repeat_interleave(torch.arange(len(class_sizes)), torch.tensor(class_sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    train, val = stratified_split(labels, val_size)
    assert torch.bincount(labels[val], minlength=len(class_sizes)).tolist() == expected
    assert torch.cat([train, val]).sort().values.tolist() == list(range(len(labels)))


def test_val_is_the_same_each_time_whatever_the_seed():
    labels = torch.arange(50_000) % 10
    torch.manual_seed(1)
    train, val = stratified_split(labels, 5000)
    torch.manual_seed(2)
    again_train, again_val = stratified_split(labels, 5000)
    assert torch.equal(train, again_train)
    assert torch.equal(val, again_val)
    # Were other images held out one day, weights trained before would have seen them.
    digest = hashlib.sha256(val.sort().values.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest == "97e94a0a3f0e37c29213e0070ad1709d713aa05d31e8e11aba743ec825e9ac68"


def test_the_first_batches_of_val_hold_every_class():
    labels = torch.arange(10).repeat_interleave(600)
    _, val = stratified_split(labels, 600)
    assert labels[val[:100]].unique().tolist() == list(range(10))


def test_load_data_splits_and_says_what_is_empty(tiny_folder):
    data = load_data(arguments("folder", tiny_folder))
    assert [len(data.train), len(data.val), len(data.test)] == [162, 18, 90]
    assert torch.bincount(data.val.labels).tolist() == [6, 6, 6]
    assert data.class_names == ("blue", "green", "red")
    for name in ("train", "val", "test"):
        split = data.split(name)
        assert split.images.shape[1:] == (3, 32, 32)
        assert split.images.dtype == torch.uint8
        assert split.images.is_contiguous(memory_format=torch.channels_last)
        assert split.labels.dtype == torch.int64
    assert len(load_data(arguments("folder", tiny_folder, val_size=60)).train) == 120
    with pytest.raises(UserError, match="the val split holds no images: give a larger --val_size"):
        load_data(arguments("folder", tiny_folder, val_size=0)).split("val")
    with pytest.raises(UserError, match="--val_size 180 leaves none of the 180 training images"):
        load_data(arguments("folder", tiny_folder, val_size=180))


def test_no_image_is_in_two_splits(tiny_folder):
    data = load_data(arguments("folder", tiny_folder))
    images = [
        image.numpy().tobytes() for split in (data.train, data.val, data.test) for image in split.images
    ]
    assert len(set(images)) == len(images) == 270


def test_the_size_of_images_is_the_flag_then_the_models_then_32(tiny_folder):
    def side(flag, model):
        data = load_data(arguments("folder", tiny_folder, image_size=flag), image_size=model)
        return data.test.images.shape[-1]

    assert [side(None, None), side(None, 24), side(16, 24)] == [32, 24, 16]
    with pytest.raises(UserError, match="--image_size 24 needs --dataset folder: synthetic has images"):
        load_data(arguments("synthetic"), image_size=24)


# Normalization.


def data_of(images):
    split = Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.zeros(len(images), dtype=torch.long))
    return ImageData(split, split, split, ("one",))


def test_normalization_equals_means_and_deviations_of_the_training_images():
    random = np.random.default_rng(0)
    images = random.integers(0, (256, 100, 30), (40, 9, 9, 3)).astype(np.uint8)
    measured = measure_normalization(data_of(images))
    np.testing.assert_allclose(measured.mean, (images / 255).mean((0, 1, 2)), atol=6e-7)
    np.testing.assert_allclose(measured.std, (images / 255).std((0, 1, 2)), atol=6e-7)


@pytest.mark.parametrize("value", [0, 1, 77, 128, 255])
def test_a_channel_of_one_colour_stays_finite(value):
    measured = measure_normalization(data_of(np.full((3, 5, 5, 3), value, np.uint8)))
    np.testing.assert_allclose(measured.mean, [value / 255] * 3, atol=6e-7)
    np.testing.assert_allclose(measured.std, [1 / 255] * 3, atol=6e-7)


# Folders of images.


@pytest.fixture
def folder(tmp_path):
    """Two classes of two plain images each, in both splits."""
    for split, shade in (("train", 0), ("test", 100)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(2):
                color = (shade + 10 * label + index, 50, 60)
                write_image(tmp_path / split / name / f"{index}.png", plain(color))
    return tmp_path


def reds(images):
    """The red of each plain image."""
    return images[:, 0, 0, 0].tolist()


def test_images_and_labels_equal_torchvisions(tiny_folder):
    (images, labels), (test, test_labels), names = image_folder.load(tiny_folder, 32)
    reference = ImageFolder(tiny_folder / "train")
    assert names == reference.classes
    assert labels.tolist() == reference.targets
    expected = np.stack([np.asarray(image) for image, _ in reference])
    np.testing.assert_array_equal(images.numpy(), expected)

    def as_set(pixels, targets):
        return {
            (np.asarray(image).tobytes(), int(label)) for image, label in zip(pixels, targets, strict=True)
        }

    reference = ImageFolder(tiny_folder / "test")
    assert as_set(test.numpy(), test_labels) == as_set([i for i, _ in reference], reference.targets)


def test_the_first_batches_of_test_hold_every_class(tiny_folder):
    _, (_, labels), _ = image_folder.load(tiny_folder, 32)
    assert labels[:20].unique().tolist() == [0, 1, 2]


def test_images_of_any_size_are_resized_to_squares(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 90, 3)).astype(np.uint8)
    write_image(folder / "train" / "cat" / "0.png", pixels)
    (images, _), _, _ = image_folder.load(folder, 20)
    assert images.shape == (4, 20, 20, 3)
    expected = Image.fromarray(pixels).resize((20, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(images[0].numpy(), np.asarray(expected))


def sixteen_bits(color):
    return Image.fromarray(np.full((8, 8), color[0] * 256 + 255, np.uint16))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("gray.png", lambda color: Image.new("L", (8, 8), color[0])),
        ("gray_alpha.png", lambda color: Image.new("LA", (8, 8), (color[0], 128))),
        ("gray_16_bits.png", sixteen_bits),
        ("gray_16_bits.tif", sixteen_bits),
        ("alpha.png", lambda color: Image.new("RGBA", (8, 8), (*color, 128))),
        ("palette.png", lambda color: Image.new("RGB", (8, 8), color).quantize(4)),
        ("cmyk.tif", lambda color: Image.new("CMYK", (8, 8), (165, 165, 165, 0))),
        ("bits.png", lambda color: Image.new("1", (8, 8), 1)),
        ("rgb.bmp", lambda color: Image.new("RGB", (8, 8), color)),
        ("RGB.PNG", lambda color: Image.new("RGB", (8, 8), color)),
    ],
)
def test_every_mode_becomes_rgb(folder, name, make):
    color = (255, 255, 255) if name == "bits.png" else (90, 90, 90)
    make(color).save(folder / "train" / "cat" / name)
    (folder / "train" / "cat" / "0.png").unlink()
    (folder / "train" / "cat" / "1.png").unlink()
    (images, labels), _, _ = image_folder.load(folder, 8)
    assert labels.tolist() == [0, 1, 1]
    assert (images[0] == torch.tensor(color)).all()


def test_a_palette_with_transparency_is_read_without_a_warning(folder, recwarn):
    image = Image.new("RGB", (8, 8), (90, 80, 70)).quantize(4)
    image.save(folder / "train" / "cat" / "0.png", transparency=bytes([128] * 4))
    (images, _), _, _ = image_folder.load(folder, 8)
    assert images[0, 0, 0].tolist() == [90, 80, 70]
    assert not recwarn.list


@pytest.mark.parametrize("count", [1, 13])
def test_any_number_of_classes(tmp_path, count):
    names = [f"class {index:02d}" for index in range(count)]
    for index, name in enumerate(reversed(names)):
        for split in ("train", "test"):
            write_image(tmp_path / split / name / "image.png", plain(count - 1 - index))
    (images, labels), (test, test_labels), found = image_folder.load(tmp_path, 8)
    assert found == names
    assert labels.tolist() == list(range(count)) == reds(images)
    assert test_labels.tolist() == reds(test)


def test_hidden_and_other_files_are_passed_over(folder):
    for path in ("train/.DS_Store", "train/cat/.0.png", "train/cat/notes.txt", "train/.hidden/0.png"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("no image")
    (images, _), _, names = image_folder.load(folder, 8)
    assert names == ["cat", "dog"]
    assert reds(images) == [0, 1, 10, 11]


def test_a_class_may_be_missing_from_test(folder):
    for path in (folder / "test" / "cat").iterdir():
        path.unlink()
    (folder / "test" / "cat").rmdir()
    _, (_, labels), names = image_folder.load(folder, 8)
    assert names == ["cat", "dog"]
    assert labels.tolist() == [1, 1]


# The cache.


@pytest.fixture
def decoded(monkeypatch):
    """The paths of the images that were decoded, as they are."""
    paths = []
    read = image_folder.read_image

    def counted(path, image_size):
        paths.append(path)
        return read(path, image_size)

    monkeypatch.setattr(image_folder, "read_image", counted)
    return paths


def test_the_second_reading_decodes_nothing_and_is_equal(folder, decoded):
    first = image_folder.load(folder, 8)
    assert len(decoded) == 8
    second = image_folder.load(folder, 8)
    assert len(decoded) == 8
    for (images, labels), (again, labels_again) in zip(first[:2], second[:2], strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)
    assert first[2] == second[2]
    image_folder.load(folder, 9)
    assert len(decoded) == 16
    image_folder.load(folder, 8)
    assert len(decoded) == 16


def added(folder):
    write_image(folder / "train/cat/2.png", plain(7))


def removed(folder):
    (folder / "train/cat/0.png").unlink()


def renamed(folder):
    (folder / "train/cat/0.png").rename(folder / "train/cat/9.png")


def moved(folder):
    (folder / "train/cat/0.png").rename(folder / "train/dog/9.png")


def written_to(folder):
    write_image(folder / "train/cat/0.png", plain((7, 50, 60)))


def replaced_keeping_size_and_time(folder):
    path = folder / "train/cat/0.png"
    status = path.stat()
    write_image(path, plain((7, 50, 60)))
    path.write_bytes(path.read_bytes().ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert path.stat().st_mtime_ns == status.st_mtime_ns


def a_class_renamed(folder):
    (folder / "train/dog").rename(folder / "train/ant")
    (folder / "test/dog").rename(folder / "test/ant")


@pytest.mark.parametrize(
    ("change", "expected", "labels"),
    [
        (added, [0, 1, 7, 10, 11], [0, 0, 0, 1, 1]),
        (removed, [1, 10, 11], [0, 1, 1]),
        (renamed, [1, 0, 10, 11], [0, 0, 1, 1]),
        (moved, [1, 10, 11, 0], [0, 1, 1, 1]),
        (written_to, [7, 1, 10, 11], [0, 0, 1, 1]),
        (replaced_keeping_size_and_time, [7, 1, 10, 11], [0, 0, 1, 1]),
        (a_class_renamed, [10, 11, 0, 1], [0, 0, 1, 1]),
    ],
)
def test_the_cache_notices_files_that_were(folder, change, expected, labels, capsys):
    image_folder.load(folder, 8)
    assert capsys.readouterr() == ("", "")
    time.sleep(0.02)  # the clock of a file system may tick every few milliseconds only
    change(folder)
    (images, found), _, _ = image_folder.load(folder, 8)
    assert reds(images) == expected
    assert found.tolist() == labels
    assert capsys.readouterr() == (made_again(folder), "")


def made_again(folder):
    return f"note: {cache_of(folder)} is damaged or of other images: they are decoded again\n"


def cache_of(folder):
    (cache,) = folder.glob(".*.cache")
    return cache


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_cache_is_made_again(folder, decoded, keep, capsys):
    image_folder.load(folder, 8)
    content = cache_of(folder).read_bytes()
    cache_of(folder).write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    (images, _), _, _ = image_folder.load(folder, 8)
    assert reds(images) == [0, 1, 10, 11]
    assert len(decoded) == 16
    image_folder.load(folder, 8)
    assert len(decoded) == 16
    assert capsys.readouterr() == (made_again(folder), "")


def test_truncating_the_cache_of_a_run_changes_nothing_there(folder):
    image_folder.load(folder, 64)
    (images, _), (test, _), _ = image_folder.load(folder, 64)
    os.truncate(cache_of(folder), 0)
    assert reds(images) == [0, 1, 10, 11]
    assert sorted(reds(test)) == [100, 101, 110, 111]


def test_a_cache_of_something_else_is_made_again(folder):
    torch.save({"weights": 1}, folder / ".images-8.cache")
    (images, _), _, _ = image_folder.load(folder, 8)
    assert reds(images) == [0, 1, 10, 11]
    assert cache_of(folder).stat().st_size == image_folder.HEADER_SIZE + 8 * 8 * 8 * 3


@pytest.mark.parametrize("place", [5, 70, 200, -1])
def test_a_flipped_bit_in_the_cache_is_noticed(folder, decoded, place, capsys):
    first = image_folder.load(folder, 8)
    content = bytearray(cache_of(folder).read_bytes())
    content[place] ^= 1
    cache_of(folder).write_bytes(content)
    second = image_folder.load(folder, 8)
    assert len(decoded) == 16
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[1][0], second[1][0])
    assert capsys.readouterr() == (made_again(folder), "")


def test_a_cache_whose_images_were_swapped_is_made_again(folder, decoded):
    image_folder.load(folder, 8)
    content = cache_of(folder).read_bytes()
    first, second = content[:-192], content[-192:]
    cache_of(folder).write_bytes(first[:-192] + second + first[-192:])
    image_folder.load(folder, 8)
    assert len(decoded) == 16


def test_neither_a_planted_temporary_nor_what_a_killed_run_left_matters(folder, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    ours, killed = (folder / f"..images-8.cache.{process}.tmp" for process in (os.getpid(), 2**40))
    ours.symlink_to(victim)
    killed.write_text("gigabytes")
    image_folder.load(folder, 8)
    assert victim.read_text() == "precious"
    assert cache_of(folder).is_file()
    assert not killed.exists()


def test_a_temporary_that_becomes_a_link_is_not_written_through(folder, tmp_path, monkeypatch, capsys):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    create = files._create_temporary

    def swapped(target):
        temporary = create(target)
        temporary.unlink()
        temporary.symlink_to(victim)
        return temporary

    monkeypatch.setattr(files, "_create_temporary", swapped)
    (images, _), _, _ = image_folder.load(folder, 8)
    assert reds(images) == [0, 1, 10, 11]
    assert victim.read_text() == "precious"
    assert capsys.readouterr().err.startswith("note: the decoded images are not cached:")


@pytest.mark.parametrize("kind", ["a socket", "a link to nothing"])
def test_a_cache_that_is_no_file_is_left_alone(folder, kind, capsys):
    cache = folder / ".images-8.cache"
    if kind == "a socket":
        os.mknod(cache, stat.S_IFSOCK | 0o600)
    else:
        cache.symlink_to(folder / "nothing")
    (images, _), _, _ = image_folder.load(folder, 8)
    assert reds(images) == [0, 1, 10, 11]
    assert not (folder / "nothing").exists()
    assert capsys.readouterr().err == (
        f"note: the decoded images are not cached: {cache} is not a regular file: remove it\n"
    )


def test_a_cache_that_is_a_link_is_neither_followed_nor_replaced(folder, tmp_path, capsys):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / ".images-8.cache").symlink_to(victim)
    (images, _), _, _ = image_folder.load(folder, 8)
    assert reds(images) == [0, 1, 10, 11]
    assert victim.read_text() == "precious"
    assert "not a regular file" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_a_fifo_does_not_block(folder, capsys):
    os.mkfifo(folder / ".images-8.cache")
    (images, _), _, _ = image_folder.load(folder, 8)
    assert reds(images) == [0, 1, 10, 11]
    assert "not a regular file" in capsys.readouterr().err
    os.mkfifo(folder / "train/cat/5.png")
    with pytest.raises(UserError, match=r"5\.png is not a regular file"):
        image_folder.load(folder, 8)


def test_a_fifo_among_the_classes_is_passed_over(folder):
    os.mkfifo(folder / "train/bird")
    (images, _), _, names = image_folder.load(folder, 8)
    assert names == ["cat", "dog"]
    assert reds(images) == [0, 1, 10, 11]


def test_images_that_do_not_fit_into_the_memory_are_refused(folder, decoded, monkeypatch):
    with pytest.raises(UserError, match="smaller --image_size"):
        image_folder.load(folder, 10**6)
    # Four training images twice, and four test images.
    needed = (2 * 4 + 4) * 8 * 8 * 3
    monkeypatch.setattr(image_folder, "_free_memory", lambda: needed - 1)
    with pytest.raises(UserError, match=r"the images of 8 pixels take .* GB, and .* GB of memory are free"):
        image_folder.load(folder, 8)
    assert not decoded
    monkeypatch.setattr(image_folder, "_free_memory", lambda: needed)
    image_folder.load(folder, 8)


def test_large_images_are_decoded_one_at_a_time(folder, monkeypatch):
    at_work, most = [], []

    def slow(image):
        at_work.append(image)
        most.append(len(at_work))
        time.sleep(0.01)
        at_work.remove(image)
        return image

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(ImageOps, "exif_transpose", slow)
    image_folder.load(folder, 8)
    assert max(most) > 1
    most.clear()
    monkeypatch.setattr(image_file, "LARGE_IMAGE", 8 * 8 - 1)
    image_folder.load(folder, 9)
    assert max(most) == 1


def test_an_image_is_not_mapped_into_memory(tmp_path, monkeypatch):
    Image.new("L", (8, 8), 77).save(tmp_path / "gray.bmp")
    monkeypatch.setattr(mmap, "mmap", None)
    assert (read_image(tmp_path / "gray.bmp", 8) == 77).all()


def test_no_other_program_decodes_an_image(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.eps")
    (tmp_path / "0.eps").rename(tmp_path / "0.png")
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    with pytest.raises(UserError, match=r"0\.png cannot be read \(it is none of BMP, GIF, JPEG, PNG"):
        read_image(tmp_path / "0.png", 8)
    assert not started


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "MPO"])
def test_an_image_may_have_the_extension_of_another_format(tmp_path, kind):
    Image.new("RGB", (8, 8), (80, 80, 80)).save(tmp_path / "image", kind)
    (tmp_path / "image").rename(tmp_path / "image.jpg")
    assert (abs(read_image(tmp_path / "image.jpg", 8).astype(int) - 80) < 3).all()


ODD_NAMES = ["\x1b[31mred", "a$b\nc", os.fsdecode(b"caf\xe9")]


def test_names_of_any_bytes_are_read_and_cached(tmp_path, decoded, capfd):
    for split in ("train", "test"):
        for shade, name in enumerate(ODD_NAMES):
            folder = tmp_path / "\x1b[2J" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (shade, 0, 0)).save(folder / os.fsdecode(b"\xff\x1b.png"))
    for size in (1, 0, 6):
        (images, labels), _, names = image_folder.load(tmp_path / "\x1b[2J", 8)
        assert names == ODD_NAMES
        assert reds(images) == labels.tolist() == [0, 1, 2]
        os.truncate(cache_of(tmp_path / "\x1b[2J"), size)
    assert len(decoded) == 18
    printed = capfd.readouterr().out
    assert printed.count("\n") == printed.count("\\x1b[2J") == 2
    assert "\x1b" not in printed


def test_the_orientation_of_a_photo_is_applied(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 200  # the upper edge is bright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    assert read_image(tmp_path / "photo.png", 4)[:, 3, 0].tolist() == [200] * 4


def test_small_data_sets_are_commented_on():
    def split(count):
        return Split(torch.zeros(count, 3, 4, 4, dtype=torch.uint8), torch.zeros(count, dtype=torch.long))

    data = ImageData(split(27), split(8), split(3), ("cat",))
    assert [note.split(":")[0] for note in notes_on_size(data, 27)] == [
        "one of 8 val images is 12.5 points",
        "one of 3 test images is 33.3 points",
        "an epoch of 27 images is one step",
    ]
    assert "no val images" in notes_on_size(ImageData(split(99), split(0), split(3), ("a", "b")), 8)[0]
    assert notes_on_size(ImageData(split(900), split(100), split(100), ("a", "b")), 8) == []


def test_one_class_is_commented_on_and_three_images_are_read(tmp_path, capsys):
    for index in range(3):
        write_image(tmp_path / "train/cat" / f"{index}.png", plain(index))
    write_image(tmp_path / "test/cat/0.png", plain(9))
    data = load_data(arguments("folder", tmp_path, image_size=8))
    assert [len(data.train), len(data.val), len(data.test)] == [3, 0, 1]
    assert capsys.readouterr().out == "note: there is one class: every model is right about every image\n"
    assert [note.split(":")[0] for note in notes_on_size(data, 8)] == [
        "there are no val images",
        "one of 1 test images is 100.0 points",
        "an epoch of 3 images is one step",
    ]


def test_a_folder_that_takes_no_cache_is_read_with_one_note(folder, capsys):
    (folder / ".images-8.cache").mkdir()
    for _ in range(2):
        (images, _), _, _ = image_folder.load(folder, 8)
        assert reds(images) == [0, 1, 10, 11]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("note: the decoded images are not cached:")
    assert sorted(path.name for path in folder.iterdir()) == [".images-8.cache", "test", "train"]


# Bad folders, as a user meets them.


def no_folder(folder):
    folder.rename(folder.with_name("elsewhere"))
    return f"{folder / 'train'} is not a folder"


def no_test(folder):
    (folder / "test").rename(folder / "elsewhere")
    return f"{folder / 'test'} is not a folder"


def no_classes(folder):
    for path in sorted((folder / "train").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    write_image(folder / "train" / "0.png", plain(1))
    return f"{folder / 'train'} holds no images: put them into one folder per class"


def no_images(folder):
    (folder / "test" / "bird").mkdir()
    (folder / "test" / "bird" / "notes.txt").write_text("later")
    return f"{folder / 'test' / 'bird'} holds no images"


def an_unknown_class(folder):
    write_image(folder / "test" / "bird" / "0.png", plain(1))
    return f"{folder / 'test' / 'bird'} is a class that {folder / 'train'} lacks"


def unreadable(content):
    def damage(folder):
        path = folder / "train" / "dog" / "1.png"
        path.write_bytes(content(path.read_bytes()))
        return f"image {path} cannot be read"

    return damage


def a_folder_named_as_an_image(folder):
    (folder / "test" / "dog" / "2.png").mkdir()
    return f"image {folder / 'test' / 'dog' / '2.png'} is not a regular file"


def a_broken_link(folder):
    (folder / "test" / "dog" / "2.png").symlink_to(folder / "nowhere.png")
    return f"{folder / 'test' / 'dog' / '2.png'} cannot be read (No such file or directory)"


def a_socket(folder):
    os.mknod(folder / "test" / "dog" / "2.png", stat.S_IFSOCK | 0o600)
    return f"image {folder / 'test' / 'dog' / '2.png'} is not a regular file"


def a_device(folder):
    (folder / "test" / "dog" / "2.png").symlink_to("/dev/zero")
    return f"image {folder / 'test' / 'dog' / '2.png'} is not a regular file"


def an_unknown_class_of_odd_bytes(folder):
    (folder / "test" / os.fsdecode(b"\x1b[31m\xff")).mkdir()
    write_image(folder / "test" / os.fsdecode(b"\x1b[31m\xff") / "0.png", plain(1))
    return f"{folder / 'test'}/\\x1b[31m\\udcff is a class that {folder / 'train'} lacks"


def floating_point(folder):
    path = folder / "test" / "dog" / "2.tif"
    Image.fromarray(np.ones((8, 8), np.float32)).save(path)
    return f"image {path} cannot be read (its pixels are floating-point numbers"


BAD_FOLDERS = {
    "missing": no_folder,
    "no test": no_test,
    "no classes": no_classes,
    "a class without images": no_images,
    "a class that train lacks": an_unknown_class,
    "an empty image": unreadable(lambda content: b""),
    "an image of garbage": unreadable(lambda content: b"garbage" * 100),
    "a truncated image": unreadable(lambda content: content[:-30]),
    "a folder as an image": a_folder_named_as_an_image,
    "a broken link": a_broken_link,
    "a socket": a_socket,
    "a device": a_device,
    "billions of pixels": unreadable(lambda content: b"P6 60000 60000 255\n" + content),
    "an unknown class of odd bytes": an_unknown_class_of_odd_bytes,
    "floating-point pixels": floating_point,
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_bad_folder_is_one_line_and_leaves_no_cache(folder, tiny_weights, run_script, kind):
    message = BAD_FOLDERS[kind](folder)
    done = run_script(
        *("evaluate.py", "--weights", tiny_weights, "--dataset", "folder", "--data_dir", folder), expect=2
    )
    assert done.stderr.startswith(f"error: {message}")
    assert not list(folder.glob(".*"))


# Decoding thousands of images ends at once when it must.

MANY = 1500


@pytest.fixture
def slow_folder(folder, monkeypatch):
    """A folder of MANY images and the list of those decoded so far, each taking 10 ms."""
    source = folder / "train" / "cat" / "0.png"
    for index in range(MANY):
        os.link(source, folder / "train" / "cat" / f"many {index:05d}.png")
    paths = []
    read = image_folder.read_image

    def slow(path, image_size):
        paths.append(path)
        time.sleep(0.01)
        return read(path, image_size)

    monkeypatch.setattr(image_folder, "read_image", slow)
    return folder, paths


def test_an_unreadable_image_ends_the_decoding_at_once(slow_folder):
    folder, paths = slow_folder
    (folder / "train" / "cat" / "0.png").unlink()
    (folder / "train" / "cat" / "0.png").write_text("no image")
    with pytest.raises(UserError, match=r"cat/0\.png cannot be read"):
        image_folder.load(folder, 8)
    assert len(paths) < MANY / 2


def test_ctrl_c_ends_the_decoding_at_once(slow_folder):
    folder, paths = slow_folder

    def press_when_under_way():
        while len(paths) < 10:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press_when_under_way)
    # A shell's background job ignores Ctrl-C; a user's foreground one does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        presser.start()
        with pytest.raises(KeyboardInterrupt):
            image_folder.load(folder, 8)
        presser.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(paths) < MANY / 2
    assert not list(folder.glob(".*"))


# CIFAR-10, with a small stand-in for its server and files.

NAMES = [f"class {index}" for index in range(10)]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def copyfile(self, *args):
        # torchvision asks once for the address alone, and hangs up while the archive is on its way.
        with suppress(ConnectionError):
            super().copyfile(*args)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Archive of 5 x 20 training and 10 test images in CIFAR-10's form, and the images themselves."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("stand-in")
    files, images, labels = {}, [], []
    for name in [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]:
        count = 10 if name == "test_batch" else 20
        images.append(random.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8))
        labels.append(np.arange(count) % 10)
        planes = images[-1].transpose(0, 3, 1, 2).reshape(count, -1)
        files[name] = pickle.dumps({"data": planes, "labels": labels[-1].tolist()})
    files["batches.meta"] = pickle.dumps({"label_names": NAMES})
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    return folder, md5, images, labels


@pytest.fixture
def server(stand_in, monkeypatch):
    """The address of the stand-in's server; torchvision is told its checksums."""
    folder, md5, _, _ = stand_in
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(CIFAR10, "train_list", [[n, m] for n, m in md5.items() if n.startswith("data")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((folder / "cifar.tar.gz").read_bytes()).hexdigest())
    handler = partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(CIFAR10, "url", f"{address}/cifar.tar.gz")
        yield address
        running.shutdown()


def unplug(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{unused.getsockname()[1]}/cifar.tar.gz")


def test_cifar10_is_downloaded_once_and_read(server, stand_in, tmp_path, monkeypatch, capsys):
    _, _, images, labels = stand_in
    first = cifar10.load(tmp_path / "data")
    assert capsys.readouterr() == (f"downloading CIFAR-10 into {tmp_path / 'data'}\n", "")
    unplug(monkeypatch)
    second = cifar10.load(tmp_path / "data")
    assert capsys.readouterr() == ("", "")
    for train, test, names in (first, second):
        np.testing.assert_array_equal(train[0].numpy(), np.concatenate(images[:5]))
        np.testing.assert_array_equal(test[0].numpy(), images[5])
        assert train[1].tolist() == np.concatenate(labels[:5]).tolist()
        assert test[1].tolist() == labels[5].tolist()
        assert names == NAMES
    data = load_data(arguments("cifar10", tmp_path / "data"))
    assert [len(data.train), len(data.val), len(data.test)] == [90, 10, 10]
    for split in (data.train, data.val, data.test):
        assert split.images.is_contiguous(memory_format=torch.channels_last)
    assert socket.getdefaulttimeout() is None


def test_without_network_the_other_sources_are_named_and_the_next_try_works(server, tmp_path, monkeypatch):
    address = CIFAR10.url
    unplug(monkeypatch)
    with pytest.raises(UserError) as error:
        cifar10.load(tmp_path / "data")
    message = str(error.value)
    assert message.startswith(f"CIFAR-10 is not in {tmp_path / 'data'} and could not be downloaded (")
    assert "Connection refused" in message
    assert "--dataset folder" in message
    assert "--dataset synthetic" in message
    assert "\n" not in message
    monkeypatch.setattr(CIFAR10, "url", address)
    train, _, _ = cifar10.load(tmp_path / "data")
    assert len(train[1]) == 100


def test_a_server_that_does_not_answer_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "NETWORK_TIMEOUT_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/cifar.tar.gz")
        start = time.perf_counter()
        with pytest.raises(UserError, match="timed out"):
            cifar10.load(tmp_path)
        assert time.perf_counter() - start < 5
    assert socket.getdefaulttimeout() is None


def test_a_page_in_place_of_the_archive_is_an_error_and_the_next_try_works(
    server, stand_in, tmp_path, monkeypatch
):
    (stand_in[0] / "login.html").write_text("please log in")
    address = CIFAR10.url
    monkeypatch.setattr(CIFAR10, "url", f"{server}/login.html")
    with pytest.raises(UserError, match="could not be downloaded"):
        cifar10.load(tmp_path)
    monkeypatch.setattr(CIFAR10, "url", address)
    assert len(cifar10.load(tmp_path)[0][1]) == 100


def test_a_download_that_was_cut_off_is_made_again(server, stand_in, tmp_path):
    archive = (stand_in[0] / "cifar.tar.gz").read_bytes()
    (tmp_path / CIFAR10.filename).write_bytes(archive[: len(archive) // 2])
    (tmp_path / CIFAR10.base_folder).mkdir()
    assert len(cifar10.load(tmp_path)[0][1]) == 100


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_files_without_network_are_one_line(server, tmp_path, monkeypatch, name):
    cifar10.load(tmp_path)
    unplug(monkeypatch)
    (tmp_path / CIFAR10.filename).unlink()
    with open(tmp_path / CIFAR10.base_folder / name, "r+b") as file:
        file.truncate(30)
    with pytest.raises(UserError) as error:
        cifar10.load(tmp_path)
    folder = tmp_path / CIFAR10.base_folder
    assert str(error.value).startswith(f"{folder} is damaged and could not be downloaded (")
    assert f"remove {folder} and connect to the network" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_data_dir_that_is_no_folder_is_one_line_without_a_download(server, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("file", "fifo", "link"):
        with pytest.raises(UserError, match=f"{name} is not a folder: give the right --data_dir"):
            cifar10.load(tmp_path / name)
    with pytest.raises(UserError, match="File name too long"):
        cifar10.load(tmp_path / ("x" * 300))
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta", "readme.html", "archive"])
@pytest.mark.parametrize("kind", ["FIFO", "socket", "folder", "huge file"])
def test_what_is_no_file_of_cifar10_neither_blocks_nor_fills_the_memory(server, tmp_path, name, kind):
    cifar10.load(tmp_path)
    folder = tmp_path / CIFAR10.base_folder
    path = tmp_path / CIFAR10.filename if name == "archive" else folder / name
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 2**40)
    with pytest.raises(UserError, match=f"{path.name} is not a regular file of CIFAR-10: remove it"):
        cifar10.load(tmp_path)


def test_a_download_writes_through_no_link(server, tmp_path):
    victim = tmp_path / "victim"
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for path in (folder / "data_batch_2", folder / "readme.html", folder.with_name(CIFAR10.filename)):
        victim.write_text("precious")
        path.symlink_to(victim)
        with pytest.raises(UserError, match=f"{path.name} is a link, and a download would follow it"):
            cifar10.load(tmp_path / "data")
        path.unlink()
        assert victim.read_text() == "precious"
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match=f"{folder.name} is a link, and a download would follow it"):
        cifar10.load(tmp_path / "data")
    assert not (tmp_path / "test_batch").exists()


def test_links_to_whole_files_and_other_files_beside_them_are_fine(server, tmp_path):
    cifar10.load(tmp_path / "shared")
    shared = tmp_path / "shared" / CIFAR10.base_folder
    (shared / "notes").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / CIFAR10.base_folder).symlink_to(shared)
    assert len(cifar10.load(tmp_path / "data")[0][1]) == 100
