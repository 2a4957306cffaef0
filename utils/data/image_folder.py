"""Image folders, DIR/train/<class>/* and DIR/test/<class>/*, decoded once and then cached."""

import hashlib
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils.common.errors import UserError, one_line
from utils.common.files import save_torch

SPLITS = ("train", "test")
# torchvision's IMG_EXTENSIONS; importing it takes a second.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
CACHE_FORMAT = 2
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
    cache = data_dir / f".images-{image_size}.cache"
    splits = _read_cache(cache, signature)
    if splits is None:
        splits = {split: _decode(data_dir, files[split], class_names, image_size) for split in SPLITS}
        try:
            save_torch(cache, {"signature": signature, "splits": splits})
        except UserError as error:
            print(f"note: the decoded images are not cached: {error}", file=sys.stderr)
    return splits["train"], splits["test"], class_names


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


def _read_cache(cache: Path, signature: str) -> dict[str, LabelledImages] | None:
    try:
        content = torch.load(cache, weights_only=True, mmap=True)
        return content["splits"] if content["signature"] == signature else None
    except Exception:
        # Missing, truncated or foreign: whatever is wrong with the cache, decoding again fixes it.
        return None


def _decode(
    data_dir: Path, files: list[os.DirEntry], class_names: list[str], image_size: int
) -> LabelledImages:
    label_of = {name: label for label, name in enumerate(class_names)}
    images = np.empty((len(files), image_size, image_size, 3), np.uint8)

    def decode(index: int) -> None:
        path = files[index].path
        try:
            images[index] = np.asarray(_read_rgb(path, image_size))
        except Exception as error:  # on damaged files, decoders raise errors of every kind
            reason = one_line(error)[:120] or type(error).__name__
            raise UserError(f"image {path} cannot be read ({reason}): replace or remove it") from error

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
    return torch.from_numpy(images), torch.tensor([label_of[_class_name(file)] for file in files])


def _read_rgb(path: str, image_size: int) -> Image.Image:
    with Image.open(path) as file:
        image: Image.Image = file
        if image.mode.startswith("I"):
            # Pillow would clip 16-bit gray levels at 255.
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range")
        elif "transparency" in image.info:
            image = image.convert("RGBA")
        image = image.convert("RGB")
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return image
