"""The three data sets; each split is held in memory as one uint8 tensor."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.common.distributed import main_first
from utils.common.errors import UserError
from utils.data import cifar10, image_folder, synthetic
from utils.data.image_folder import LabelledImages

LARGE_TRAIN_SPLIT = 50_000
VAL_SIZE_OF_LARGE = 5_000
VAL_FRACTION_OF_SMALL = 0.1
# Not --seed: otherwise weights trained with one seed would have seen the val images of another.
VAL_SPLIT_SEED = 20180113
DEFAULT_IMAGE_SIZE = 32
FEW_IMAGES = 100


@dataclass(frozen=True)
class Split:
    """Images (N, 3, H, W) uint8, channels last in memory, and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "Split":
        """Return the images at `indices`, in that order."""
        # Indexing in the memory layout, (N, H, W, 3), copies contiguous rows.
        images = self.images.permute(0, 2, 3, 1)[indices].permute(0, 3, 1, 2)
        return Split(images, self.labels[indices])


@dataclass(frozen=True)
class Normalization:
    """Channel means and standard deviations of pixels scaled to [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: they are not three means and three positive deviations, or so large or small that
                normalized pixels are not finite.
        """
        fits = len(self.mean) == len(self.std) == 3 and all(abs(mean) <= 1e6 for mean in self.mean)
        if not (fits and all(1e-6 <= std <= 1e6 for std in self.std)):
            raise ValueError(
                f"the normalization {self.mean}, {self.std} is not three means and three positive deviations"
            )


@dataclass(frozen=True)
class ImageData:
    """The three splits of a data set, and its class names in label order."""

    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    normalization: Normalization | None = None
    """That of --normalization, if it was given."""

    def split(self, name: str) -> Split:
        """Return the split `train`, `val` or `test`.

        Raises:
            UserError: the split holds no images.
        """
        split: Split = getattr(self, name)
        if not len(split):
            raise UserError(f"the {name} split holds no images: give a larger --val_size")
        return split


def load_data(args: Namespace, image_size: int | None = None) -> ImageData:
    """Load the data set that --dataset, --data_dir, --image_size and --val_size describe.

    Args:
        args: the parsed command line.
        image_size: side in pixels of the images that the model was trained on; --image_size takes
            precedence.

    Raises:
        UserError: images are missing or unreadable, or the arguments do not fit the data set.
    """
    side = args.image_size or image_size or DEFAULT_IMAGE_SIZE
    with main_first():
        train, test, class_names = _load_source(args.dataset, Path(args.data_dir), side)
    if len(class_names) == 1:
        print("note: there is one class: every model is right about every image", flush=True)
    train_split, test_split = _as_split(*train), _as_split(*test)
    val_size = args.val_size
    if val_size is None:
        val_size = default_val_size(len(train_split))
    if val_size >= len(train_split):
        raise UserError(f"--val_size {val_size} leaves none of the {len(train_split)} training images")
    train_indices, val_indices = stratified_split(train_split.labels, val_size)
    return ImageData(
        train_split.subset(train_indices),
        train_split.subset(val_indices),
        test_split,
        tuple(class_names),
        given_normalization(args),
    )


def given_normalization(args: Namespace) -> Normalization | None:
    """Return the normalization that --normalization gives, if any.

    Raises:
        UserError: a standard deviation is 0.
    """
    given = getattr(args, "normalization", None)
    if given is None:
        return None
    try:
        return Normalization(tuple(given[:3]), tuple(given[3:]))
    except ValueError as error:
        raise UserError("--normalization takes three means and three standard deviations above 0") from error


def notes_on_size(data: ImageData, batch_size: int) -> list[str]:
    """Return what the user should know about a data set that is small for training."""
    steps, val, test = len(data.train) // batch_size, len(data.val), len(data.test)
    notes = []
    if not val:
        notes.append("there are no val images: the last epoch counts as the best")
    elif val < FEW_IMAGES:
        notes.append(f"one of {val} val images is {100 / val:.1f} points: the best epoch is partly chance")
    if test < FEW_IMAGES:
        notes.append(f"one of {test} test images is {100 / test:.1f} points: the accuracy is partly chance")
    if steps <= 1:
        notes.append(
            f"an epoch of {len(data.train)} images is one step: give a smaller --batch_size or more --epochs"
        )
    return notes


def _load_source(
    dataset: str, data_dir: Path, image_size: int
) -> tuple[LabelledImages, LabelledImages, list[str]]:
    if dataset == "folder":
        return image_folder.load(data_dir, image_size)
    if image_size != DEFAULT_IMAGE_SIZE:
        raise UserError(
            f"--image_size {image_size} needs --dataset folder: "
            f"{dataset} has images of {DEFAULT_IMAGE_SIZE} pixels"
        )
    load = cifar10.load if dataset == "cifar10" else synthetic.load
    return load(data_dir)


def measure_normalization(data: ImageData) -> Normalization:
    """Return the channel means and standard deviations of the training images, unless they were given."""
    if data.normalization is not None:
        return data.normalization
    pixels = data.train.images.permute(1, 0, 2, 3).reshape(3, -1)
    # Exact and fast: the mean and deviation of a channel follow from its histogram of 256 values.
    counts = np.stack([torch.bincount(channel, minlength=256).numpy() for channel in pixels])
    values = np.arange(256) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1))
    # A constant channel has a deviation of 0; 1/255 keeps the division finite.
    std = np.maximum(std, 1 / 255)
    return Normalization(tuple(mean.round(6).tolist()), tuple(std.round(6).tolist()))


def default_val_size(train_size: int) -> int:
    """Return 5,000 for a training split of 50,000 images or more, else 10 % of it."""
    if train_size >= LARGE_TRAIN_SPLIT:
        return VAL_SIZE_OF_LARGE
    return round(train_size * VAL_FRACTION_OF_SMALL)


def stratified_split(labels: Tensor, val_size: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the train and the val split, the same ones at every call.

    Each class has its proportional share of val: shares are rounded down, and the images still missing
    go to the classes with the largest remainders.
    """
    generator = torch.Generator().manual_seed(VAL_SPLIT_SEED)
    shares = torch.bincount(labels) * val_size  # in units of 1 / len(labels), to stay exact
    val_sizes = shares // len(labels)
    missing = val_size - int(val_sizes.sum())
    val_sizes[torch.argsort(shares % len(labels), descending=True, stable=True)[:missing]] += 1
    val = []
    for label, size in enumerate(val_sizes.tolist()):
        members = torch.nonzero(labels == label).flatten()
        val.append(members[torch.randperm(len(members), generator=generator)[:size]])
    # Shuffled, so that the first few batches of val hold every class.
    val_indices = torch.cat(val)[torch.randperm(val_size, generator=generator)]
    is_train = torch.ones(len(labels), dtype=torch.bool)
    is_train[val_indices] = False
    return torch.nonzero(is_train).flatten(), val_indices


def _as_split(images: Tensor, labels: Tensor) -> Split:
    """Return images (N, H, W, 3) as a split of (N, 3, H, W), without copying."""
    return Split(images.permute(0, 3, 1, 2), labels)
