"""Image folders, DIR/train/<class>/* and DIR/test/<class>/*, decoded once and then cached."""

import hashlib
import math
import os
import random
import stat
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.common.errors import UserError
from utils.common.files import atomic_write
from utils.data.image_file import IMAGE_EXTENSIONS, read_image

SPLITS = ("train", "test")
CACHE_FORMAT = 3
HEADER_SIZE = 128
TEST_ORDER_SEED = 0

LabelledImages = tuple[Tensor, Tensor]
"""Images (N, H, W, 3) uint8 and labels (N,) int64."""


def load(data_dir: Path, image_size: int) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """Return the training images, the test images and the class names of a folder.

    Images are resized to squares of `image_size` pixels.

    Raises:
        UserError: a folder is missing or empty, `test` has a class that `train` lacks, or an
            image cannot be read.
    """
    try:
        files, class_names = _list_images(data_dir)
        signature = _signature(files, image_size)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): fix or remove it") from error
    shapes = {split: (len(files[split]), image_size, image_size, 3) for split in SPLITS}
    _check_memory(sum(math.prod(shape) for shape in shapes.values()), image_size)
    cache = data_dir / f".images-{image_size}.cache"
    images = _read_cache(cache, signature, shapes)
    if images is None:
        images = {split: _decode(data_dir, files[split], image_size) for split in SPLITS}
        _write_cache(cache, signature, images)
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = {split: [label_of[_class_name(file)] for file in files[split]] for split in SPLITS}
    train, test = ((torch.from_numpy(images[split]), torch.tensor(labels[split])) for split in SPLITS)
    return train, test, class_names


def _check_memory(size: int, image_size: int) -> None:
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise UserError(
            f"the images of {image_size} pixels take {size / 1e9:.0f} GB, more than this machine's memory: "
            "give a smaller --image_size"
        )


def _list_images(data_dir: Path) -> tuple[dict[str, list[os.DirEntry]], list[str]]:
    files: dict[str, list[os.DirEntry]] = {}
    classes: dict[str, list[str]] = {}
    for split in SPLITS:
        folder = data_dir / split
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder: --dataset folder reads {data_dir}/train/<class>/* and "
                f"{data_dir}/test/<class>/*; give the right --data_dir"
            )
        classes[split] = sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
        )
        files[split] = []
        for name in classes[split]:
            images = [
                entry
                for entry in os.scandir(folder / name)
                if entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.name.startswith(".")
            ]
            if not images:
                raise UserError(f"{folder / name} holds no images ({', '.join(IMAGE_EXTENSIONS)})")
            files[split] += sorted(images, key=lambda entry: entry.name)
        if not classes[split]:
            raise UserError(f"{folder} holds no images: put them into one folder per class")
    unknown = sorted(set(classes["test"]) - set(classes["train"]))
    if unknown:
        raise UserError(
            f"{data_dir / 'test' / unknown[0]} is a class that {data_dir / 'train'} lacks: "
            "rename or remove it"
        )
    # Shuffled, so that the first few batches of the test split hold every class.
    random.Random(TEST_ORDER_SEED).shuffle(files["test"])
    return files, classes["train"]


def _signature(files: dict[str, list[os.DirEntry]], image_size: int) -> str:
    """Return a hash that changes when a file is added, removed, renamed or written to."""
    rows = [f"{CACHE_FORMAT} {image_size}"]
    for split in SPLITS:
        for entry in files[split]:
            status = entry.stat()
            # The change time reveals a file that was put in place with an old modification time.
            times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
            rows.append(f"{split} {_class_name(entry)} {entry.name} {status.st_size} {times}")
    return hashlib.sha256("\0".join(rows).encode("utf-8", "surrogateescape")).hexdigest()


def _class_name(file: os.DirEntry) -> str:
    return file.path.split(os.sep)[-2]


def _read_cache(
    cache: Path, signature: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray] | None:
    """Return the images of each split, or None if the cache is not a whole one of these files."""
    content = np.empty(sum(math.prod(shape) for shape in shapes.values()), np.uint8)
    try:
        with open(cache, "rb", opener=_open_own) as file:
            header, size = file.read(HEADER_SIZE), file.readinto(content.data)
            is_whole = size == len(content) and not file.read(1)
    except OSError:
        # Whatever is wrong with the cache, decoding again fixes it.
        return None
    if not is_whole or header != _header(signature, content):
        return None
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
    parts = np.split(content, ends)
    return {split: part.reshape(shapes[split]) for split, part in zip(shapes, parts, strict=True)}


def _write_cache(cache: Path, signature: str, images: dict[str, np.ndarray]) -> None:
    content = np.concatenate([part.reshape(-1) for part in images.values()])
    try:
        if cache.is_symlink() or (cache.exists() and not cache.is_file()):
            raise UserError(f"{cache} is not a regular file: remove it")
        with atomic_write(cache) as temporary, open(temporary, "wb") as file:
            file.write(_header(signature, content))
            file.write(content.data)
    except UserError as error:
        print(f"note: the decoded images are not cached: {error}", file=sys.stderr)


def _header(signature: str, content: np.ndarray) -> bytes:
    """Return what a cache begins with: hashes of the image files and of their decoded pixels."""
    return signature.encode() + hashlib.sha256(content.data).hexdigest().encode()


def _open_own(path: str, flags: int) -> int:
    """Open a regular file; a link is not followed, and a FIFO does not block."""
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor


def _decode(data_dir: Path, files: list[os.DirEntry], image_size: int) -> np.ndarray:
    images = np.empty((len(files), image_size, image_size, 3), np.uint8)

    def decode(index: int) -> None:
        images[index] = read_image(files[index].path, image_size)

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        progress = tqdm(
            pool.map(decode, range(len(files))),
            total=len(files),
            desc=f"decoding {data_dir}",
            disable=not sys.stderr.isatty(),
            leave=False,
        )
        for _ in progress:
            pass
    finally:
        # After an unreadable image or Ctrl-C, thousands may still be queued.
        pool.shutdown(cancel_futures=True)
    return images
