"""Batches of augmented, normalized images."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.common import distributed
from utils.data.augmentation import augment_images
from utils.data.datasets import Normalization, Split


@dataclass(frozen=True)
class Loader:
    """Iterate over a split as (images (B, 3, H, W) float32 channels last, labels (B,)).

    Args:
        split: the images.
        normalization: channel means and standard deviations that the model was trained with.
        batch_size: images per batch; the last batch may be smaller, unless `drop_last` is set.
        shuffle: draw a new order for each `epoch`. It depends only on `seed` and `epoch`, so a
            resumed run sees the same batches as an uninterrupted one.
        augment: one of AUGMENTATIONS.
        cutout_size: side of the cutout in pixels.
        drop_last: leave out a last batch smaller than `batch_size`.
        limit: maximum number of batches; None for the whole split.
        sharded: yield only this process's shard of each batch in a distributed run.
        seed: seeds the order and the augmentation.
        epoch: varies both from epoch to epoch.
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
                # Shard after augmenting, so that each process draws the same numbers as a single one would.
                images, labels = distributed.shard(images), distributed.shard(labels)
            yield normalize(images, self.normalization), labels


def normalize(images: Tensor, normalization: Normalization) -> Tensor:
    """Return uint8 images (N, 3, H, W) as normalized float32."""
    mean = torch.tensor(normalization.mean).view(1, 3, 1, 1)
    std = torch.tensor(normalization.std).view(1, 3, 1, 1)
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)
