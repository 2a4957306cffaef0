"""The loader: batches of normalized images."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.common import distributed
from utils.data.augmentation import augment_images
from utils.data.datasets import Normalization, Split


@dataclass(frozen=True)
class Loader:
    """Iterates over a split as (images (B, 3, H, W) float32 channels last, labels (B,)).

    Args:
        split: the images.
        normalization: subtracted and divided by, so that the model sees the values it was trained on.
        batch_size: images per batch; the last batch is smaller, and left out with `drop_last`.
        shuffle: a new order at each `epoch`, drawn from `seed` and `epoch` alone, so that a
            resumed run sees what an unbroken one would.
        limit: number of batches, at most; None for all.
        sharded: whether each process of a run over several gets its shard of a batch only.
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
    """Map uint8 images (N, 3, H, W) to the float32 values that a model takes."""
    mean = torch.tensor(normalization.mean).view(1, 3, 1, 1)
    std = torch.tensor(normalization.std).view(1, 3, 1, 1)
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)
