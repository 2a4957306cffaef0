"""Augmentation of a batch at a time, on uint8 tensors."""

import torch
from torch import Tensor

CROP_PADDING = 4
AUGMENTATIONS = ("none", "flip", "crop_flip", "crop_flip_cutout", "crop_flip_trivialaugment_cutout")
TRIVIALAUGMENT_GROUP = 4
"""Images that share a draw: one by one takes three times as long."""


def augment_images(images: Tensor, augment: str, cutout_size: int, generator: torch.Generator) -> Tensor:
    """Return a new uint8 tensor (N, 3, H, W): each image shifted, mirrored and cut out by its own draw.

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
    from torchvision.transforms import v2  # takes a second, and only this needs it

    transform = v2.TrivialAugmentWide()
    # torchvision draws from the global generator alone, which a resumed run does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return torch.cat([transform(group) for group in images.split(TRIVIALAUGMENT_GROUP)])


def _within(position: Tensor, start: Tensor, length: int) -> Tensor:
    return (position >= start) & (position < start + length)
