"""Batches of normalized images, augmented a batch at a time on tensors."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from utils.common import distributed
from utils.data.datasets import Normalization, Split

CROP_PADDING = 4
AUGMENTATIONS = ("none", "flip", "crop_flip", "crop_flip_cutout", "crop_flip_trivialaugment_cutout")
TRIVIALAUGMENT_GROUP = 4
"""Images that share a draw: one by one takes three times as long."""


@dataclass(frozen=True)
class Batches:
    """Iterates over a split as (images (B, 3, H, W) float32 channels last, labels (B,)).

    Args:
        split: the images.
        normalization: subtracted and divided by, so that the model sees the numbers it knows.
        batch_size: images a batch; the last batch is smaller, and left out with `drop_last`.
        shuffle: a new order at each `epoch`, drawn from `seed` and `epoch` alone, so that a
            resumed run sees what an unbroken one would.
        limit: batches in all, at most; None is as many as the split makes.
        sharded: whether each process of a run over several gets its slice of a batch only.
        augment: one of AUGMENTATIONS: zero-padded random crop, horizontal flip, TrivialAugment
            (Müller & Hutter, 2021, https://arxiv.org/abs/2103.10158), and cutout (DeVries &
            Taylor, 2017, https://arxiv.org/abs/1708.04552) of `cutout_size` pixels.
    """

    split: Split
    normalization: Normalization
    batch_size: int
    shuffle: bool = False
    augment: str = "none"
    cutout_size: int = 8
    drop_last: bool = False
    limit: int | None = None
    sharded: bool = False
    seed: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.split), self.batch_size)
        count = whole if self.drop_last or not rest else whole + 1
        return count if self.limit is None else min(count, self.limit)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.split)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = self.split.subset(order[start : start + self.batch_size])
            images = augment_images(batch.images, self.augment, self.cutout_size, generator)
            labels = batch.labels
            if self.sharded:
                # After augmenting, so that every process has drawn what a single one would.
                images, labels = distributed.shard(images), distributed.shard(labels)
            yield normalize(images, self.normalization), labels


def normalize(images: Tensor, normalization: Normalization) -> Tensor:
    """From uint8 images (N, 3, H, W) to the float32 numbers that a model takes."""
    mean = torch.tensor(normalization.mean).view(1, 3, 1, 1)
    std = torch.tensor(normalization.std).view(1, 3, 1, 1)
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)


def augment_images(images: Tensor, augment: str, cutout_size: int, generator: torch.Generator) -> Tensor:
    """A new uint8 tensor (N, 3, H, W): each image shifted, mirrored and cut out by its own draw.

    TrivialAugment has a draw for TRIVIALAUGMENT_GROUP images. Pixels from outside the image, and
    those cut out, are 0.
    """
    if augment == "none":
        return images
    count, _, height, width = images.shape
    padding = CROP_PADDING if "crop" in augment else 0
    padded = images.permute(0, 2, 3, 1)
    if padding:
        padded = torch.nn.functional.pad(padded, (0, 0, padding, padding, padding, padding))
    top = torch.randint(2 * padding + 1, (count, 1), generator=generator)
    left = torch.randint(2 * padding + 1, (count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = torch.arange(width)
    columns = left + torch.where(mirrored, columns.flip(0), columns)
    # One gather crops and mirrors every image.
    result = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if "trivialaugment" in augment:
        result = _trivialaugment(result.permute(0, 3, 1, 2), generator).permute(0, 2, 3, 1).contiguous()
    if augment.endswith("cutout") and cutout_size:
        center_y = torch.randint(height, (count, 1), generator=generator)
        center_x = torch.randint(width, (count, 1), generator=generator)
        half = cutout_size // 2
        in_rows = _within(torch.arange(height), center_y - half, cutout_size)
        in_columns = _within(torch.arange(width), center_x - half, cutout_size)
        result[in_rows[:, :, None] & in_columns[:, None, :]] = 0
    return result.permute(0, 3, 1, 2)


def _trivialaugment(images: Tensor, generator: torch.Generator) -> Tensor:
    transform = v2.TrivialAugmentWide()
    # torchvision draws from the global generator alone, which a resumed run does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return torch.cat([transform(group) for group in images.split(TRIVIALAUGMENT_GROUP)])


def _within(position: Tensor, start: Tensor, length: int) -> Tensor:
    return (position >= start) & (position < start + length)
