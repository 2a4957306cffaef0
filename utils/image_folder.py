"""Folders of images, DIR/train/<class>/* and DIR/test/<class>/*, decoded once and then cached."""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from utils.errors import UserError, one_line
from utils.files import save_torch

SPLITS = ("train", "test")
CACHE_FORMAT = 1

LabelledImages = tuple[Tensor, Tensor]
"""Images (N, H, W, 3) uint8 and labels (N,) int64."""


def load(data_dir: Path, image_size: int) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """The train and the test images of a folder, resized to squares, and the class names.

    Raises:
        UserError: a folder is missing or empty, `test` has a class that `train` lacks, or an
            image cannot be read.
    """
    files, class_names = _list_images(data_dir)
    cache = data_dir / f".images-{image_size}.cache"
    signature = _signature(data_dir, files, image_size)
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
                f"{folder} is no folder: --dataset folder reads {data_dir}/train/<class>/* and "
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
                if entry.name.lower().endswith(IMG_EXTENSIONS) and not entry.name.startswith(".")
            ]
            if not images:
                raise UserError(f"{folder / name} holds no images ({', '.join(IMG_EXTENSIONS)})")
            files[split] += sorted(images, key=lambda entry: entry.name)
        if not classes[split]:
            raise UserError(f"{folder} holds no images: it wants one folder a class, with images in it")
    unknown = sorted(set(classes["test"]) - set(classes["train"]))
    if unknown:
        raise UserError(
            f"{data_dir / 'test' / unknown[0]} is a class that {data_dir / 'train'} lacks: "
            "rename or remove it"
        )
    return files, classes["train"]


def _signature(data_dir: Path, files: dict[str, list[os.DirEntry]], image_size: int) -> str:
    """Changes when a file is added, removed, renamed or written to."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {image_size}".encode())
    for split in SPLITS:
        for entry in files[split]:
            status = entry.stat()
            name = os.path.relpath(entry.path, data_dir)
            digest.update(
                f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
            )
    return digest.hexdigest()


def _read_cache(cache: Path, signature: str) -> dict[str, LabelledImages] | None:
    try:
        content = torch.load(cache, weights_only=True, mmap=True)
        return content["splits"] if content["signature"] == signature else None
    except Exception:
        # Missing, truncated or foreign: whatever is wrong with it, decoding again mends it.
        return None


def _decode(
    data_dir: Path, files: list[os.DirEntry], class_names: list[str], image_size: int
) -> LabelledImages:
    label_of = {name: label for label, name in enumerate(class_names)}
    images = torch.empty(len(files), image_size, image_size, 3, dtype=torch.uint8)

    def decode(index: int) -> None:
        path = files[index].path
        try:
            image = pil_loader(path)
            if image.size != (image_size, image_size):
                image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
            images[index] = pil_to_tensor(image).permute(1, 2, 0)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(
                f"image {path} cannot be read ({one_line(error)[:120]}): replace or remove it"
            ) from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm(
            pool.map(decode, range(len(files))),
            total=len(files),
            desc=f"decoding {data_dir}",
            disable=not sys.stderr.isatty(),
            leave=False,
        )
        for _ in progress:
            pass
    labels = torch.tensor([label_of[os.path.basename(os.path.dirname(f.path))] for f in files])
    return images, labels
