"""Image folders, DIR/train/<class>/* and DIR/test/<class>/*, decoded once and then cached."""

import hashlib
import math
import os
import random
import re
import stat
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.common.distributed import is_main
from utils.common.errors import UserError, one_line, printable
from utils.common.files import atomic_write, check_output
from utils.data.image_file import IMAGE_EXTENSIONS, read_image

SPLITS = ("train", "test")
CACHE_FORMAT = 4
HEADER_SIZE = 64 + 8
TEST_ORDER_SEED = 0

LabelledImages = tuple[Tensor, Tensor]
"""Images (N, H, W, 3) uint8 and labels (N,) int64."""


def load(data_dir: Path, image_size: int) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """Return the training images, the test images and the class names of a folder.

    Images are resized to squares of `image_size` pixels.

    Raises:
        UserError: a folder is missing or empty, `test` has a class that `train` lacks, or an
            image cannot be read, or the images do not fit into the free memory.
    """
    try:
        files, class_names = _list_images(data_dir)
        signature = _signature(files, image_size)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): fix or remove it") from error
    shapes = {split: (len(files[split]), image_size, image_size, 3) for split in SPLITS}
    # The training images are held twice while val is split off.
    _check_memory(2 * math.prod(shapes["train"]) + math.prod(shapes["test"]), image_size)
    # An array per split: the whole training split is given back once val has been split off.
    images = {split: np.empty(shapes[split], np.uint8) for split in SPLITS}
    cache = data_dir / f".images-{image_size}.cache"
    if not _read_cache(cache, signature, images):
        for split in SPLITS:
            _decode(data_dir, files[split], images[split])
        _write_cache(cache, signature, images)
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = {split: [label_of[_class_name(file)] for file in files[split]] for split in SPLITS}
    train, test = ((torch.from_numpy(images[split]), torch.tensor(labels[split])) for split in SPLITS)
    return train, test, class_names


def _check_memory(size: int, image_size: int) -> None:
    free = _free_memory()
    if size > free:
        raise UserError(
            f"the images of {image_size} pixels take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory "
            "are free: give a smaller --image_size"
        )


def _free_memory() -> float:
    """Return the bytes that the system can still give, with swap; infinity where it does not say."""
    try:
        status = Path("/proc/meminfo").read_text()
    except OSError:
        return math.inf
    return 1024 * sum(map(int, re.findall(r"(?:MemAvailable|SwapFree): *(\d+) kB", status)))


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


def _read_cache(cache: Path, signature: str, images: dict[str, np.ndarray]) -> bool:
    """Fill `images` from the cache, and return whether it is a whole one of these files."""
    try:
        # Read rather than mapped: a mapped file that another process truncates kills this one.
        with open(cache, "rb", opener=_open_own) as file:
            header = file.read(HEADER_SIZE)
            is_whole = header.startswith(signature.encode()) and all(
                file.readinto(part.reshape(-1).data) == part.nbytes for part in images.values()
            )
    except OSError:
        # Whatever is wrong with the cache, decoding again fixes it, or _write_cache says why not.
        return False
    if is_whole and header == _header(signature, images):
        return True
    name = printable(str(cache))
    print(f"note: {name} is damaged or of other images: they are decoded again", flush=True)
    return False


def _write_cache(cache: Path, signature: str, images: dict[str, np.ndarray]) -> None:
    try:
        if cache.is_symlink() or (cache.exists() and not cache.is_file()):
            raise UserError(f"{cache} is not a regular file: remove it")
        # Also removes what killed runs have left.
        check_output(cache, force=True)
        with atomic_write(cache) as temporary, open(temporary, "wb", opener=_open_own) as file:
            file.write(_header(signature, images))
            for part in images.values():
                file.write(part.reshape(-1).data)
    except UserError as error:
        if is_main():
            print(f"note: the decoded images are not cached: {one_line(error)}", file=sys.stderr)


def _header(signature: str, images: dict[str, np.ndarray]) -> bytes:
    """Return what a cache begins with: a hash of the image files and a checksum of their decoded pixels."""
    checksum = 0
    for part in images.values():
        # Three times as fast as SHA-256. Who could forge a checksum could change the images as well.
        checksum = zlib.crc32(part.reshape(-1).data, checksum)
    return f"{signature}{checksum:08x}".encode()


def _open_own(path: str, flags: int) -> int:
    """Open a regular file; a link is not followed, and a FIFO does not block."""
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor


def _decode(data_dir: Path, files: list[os.DirEntry], images: np.ndarray) -> None:
    """Fill `images` (N, side, side, 3) with the pixels of the files."""

    def decode(index: int) -> None:
        images[index] = read_image(files[index].path, images.shape[1])

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        progress = tqdm(
            pool.map(decode, range(len(files))),
            total=len(files),
            desc=f"decoding {printable(str(data_dir))}",
            disable=not sys.stderr.isatty(),
            leave=False,
        )
        for _ in progress:
            pass
    finally:
        # After an unreadable image or Ctrl-C, thousands may still be queued.
        pool.shutdown(cancel_futures=True)
