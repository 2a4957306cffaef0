"""Random crops, flips, TrivialAugment and cutout, on a whole batch of uint8 images at once."""

import torch
from torch import Tensor

AUGMENTATIONS = ("none", "flip", "crop_flip", "crop_flip_cutout", "crop_flip_trivialaugment_cutout")
CROP_PADDING = 4
TRIVIALAUGMENT_GROUP = 4
"""Images per TrivialAugment draw; a draw per image takes three times as long."""


def augment_images(images: Tensor, augment: str, cutout_size: int, generator: torch.Generator) -> Tensor:
    """Return a new uint8 tensor (N, 3, H, W) with each image randomly cropped, flipped and cut out.

    Pixels from outside the image and those cut out are 0.

    Args:
        images: (N, 3, H, W), uint8.
        augment: one of AUGMENTATIONS: zero-padded random crop, horizontal flip, TrivialAugment
            (Müller & Hutter, 2021, https://arxiv.org/abs/2103.10158), and cutout (DeVries &
            Taylor, 2017, https://arxiv.org/abs/1708.04552).
        cutout_size: side of the cutout in pixels.
        generator: the source of every random number.
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
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = torch.arange(width)
    columns = left + torch.where(flipped, columns.flip(0), columns)
    # A single gather crops and flips every image.
    result = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if "trivialaugment" in augment:
        result = _trivialaugment(result.permute(0, 3, 1, 2), generator).permute(0, 2, 3, 1).contiguous()
    if augment.endswith("cutout") and cutout_size:
        center_y = torch.randint(height, (count, 1), generator=generator)
        center_x = torch.randint(width, (count, 1), generator=generator)
        in_rows = _within(torch.arange(height), center_y - cutout_size // 2, cutout_size)
        in_columns = _within(torch.arange(width), center_x - cutout_size // 2, cutout_size)
        result[in_rows[:, :, None] & in_columns[:, None, :]] = 0
    return result.permute(0, 3, 1, 2)


def _trivialaugment(images: Tensor, generator: torch.Generator) -> Tensor:
    # torchvision takes a second to import, and only this augmentation needs it.
    from torchvision.transforms import v2

    transform = v2.TrivialAugmentWide()
    # It draws only from the global generator, which a resumed run does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return torch.cat([transform(group) for group in images.split(TRIVIALAUGMENT_GROUP)])


def _within(position: Tensor, start: Tensor, length: int) -> Tensor:
    return (position >= start) & (position < start + length)
