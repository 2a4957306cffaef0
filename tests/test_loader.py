from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from utils.data.augmentation import AUGMENTATIONS, CROP_PADDING, TRIVIALAUGMENT_GROUP, augment_images
from utils.data.datasets import Normalization, Split
from utils.data.loader import Loader, normalize

NORMALIZATION = Normalization((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
IDENTITY = Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
SIDE = 16


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def channels_last(images):
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.fixture
def split():
    images = torch.randint(256, (50, 3, SIDE, SIDE), dtype=torch.uint8, generator=seeded())
    return Split(channels_last(images), torch.arange(50))


def positions(count, side=SIDE):
    """Images whose pixels tell their own place: (row + 1, column + 1, 255)."""
    image = np.zeros((side, side, 3), np.uint8)
    image[..., 0] = np.arange(side)[:, None] + 1
    image[..., 1] = np.arange(side) + 1
    image[..., 2] = 255
    return torch.from_numpy(image).permute(2, 0, 1).expand(count, -1, -1, -1)


def naive_crop_flip(image, top, left, mirrored, padding=CROP_PADDING):
    """One image at a time with numpy: (H, W, 3)."""
    side = image.shape[0]
    padded = np.zeros((side + 2 * padding, side + 2 * padding, 3), np.uint8)
    padded[padding : padding + side, padding : padding + side] = image
    window = padded[top : top + side, left : left + side]
    return window[:, ::-1] if mirrored else window


def test_normalize_equals_torchvision(split):
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(NORMALIZATION.mean, NORMALIZATION.std)]
    )
    expected = torch.stack(
        [transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in split.images]
    )
    images = normalize(split.images, NORMALIZATION)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)


def test_batches_lie_channels_last_in_memory(split):
    for augment in AUGMENTATIONS:
        for images, _ in Loader(split, NORMALIZATION, 8, augment=augment):
            assert images.is_contiguous(memory_format=torch.channels_last)


def test_every_crop_is_a_window_of_the_padded_image_or_its_mirror_image():
    source = positions(1)[0].permute(1, 2, 0).numpy()
    crops = augment_images(positions(4000), "crop_flip", 0, seeded()).permute(0, 2, 3, 1).numpy()
    seen = set()
    for crop in crops:
        # The centre is never padding, so its value tells the draw.
        row, column, _ = crop[SIDE // 2, SIDE // 2].astype(int)
        mirrored = crop[SIDE // 2, SIDE // 2 + 1, 1] < column
        top = row - 1 - SIDE // 2 + CROP_PADDING
        column_in_window = SIDE - 1 - SIDE // 2 if mirrored else SIDE // 2
        left = column - 1 - column_in_window + CROP_PADDING
        np.testing.assert_array_equal(crop, naive_crop_flip(source, top, left, mirrored))
        seen.add((top, left, bool(mirrored)))
    offsets = range(2 * CROP_PADDING + 1)
    assert seen == {(y, x, m) for y in offsets for x in offsets for m in (False, True)}


def test_a_flip_mirrors_half_of_the_images_and_moves_none():
    images = positions(2000)
    flipped = augment_images(images, "flip", 0, seeded())
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert 900 < int(mirrored.sum()) < 1100


@pytest.mark.parametrize("size", [1, 5, 8])
def test_cutout_zeroes_one_square_clipped_at_the_edge(size, monkeypatch):
    monkeypatch.setattr("utils.data.augmentation.CROP_PADDING", 0)
    white = torch.full((4000, 3, SIDE, SIDE), 255, dtype=torch.uint8)
    cut = augment_images(white, "crop_flip_cutout", size, seeded())
    assert torch.equal(cut.unique(), torch.tensor([0, 255], dtype=torch.uint8))
    is_cut = cut == 0
    assert torch.equal(is_cut.all(1), is_cut.any(1))
    rows, columns = is_cut[:, 0].any(2), is_cut[:, 0].any(1)
    assert torch.equal(is_cut[:, 0], rows[:, :, None] & columns[:, None, :])

    def interval(line):
        places = line.nonzero().flatten().tolist()
        assert places == list(range(places[0], places[-1] + 1))
        return places[0], places[-1]

    boxes = {(interval(y), interval(x)) for y, x in zip(rows, columns, strict=True)}
    first = [center - size // 2 for center in range(SIDE)]
    intervals = [(max(0, start), min(SIDE, start + size) - 1) for start in first]
    assert boxes == {(y, x) for y in intervals for x in intervals}


def test_cutout_of_size_0_is_crop_and_flip(split):
    cut = augment_images(split.images, "crop_flip_cutout", 0, seeded())
    assert torch.equal(cut, augment_images(split.images, "crop_flip", 8, seeded()))


def test_trivialaugment_varies_groups_of_images_and_is_cut_out_afterwards():
    images = positions(40)
    varied = augment_images(images, "crop_flip_trivialaugment_cutout", 0, seeded())
    assert varied.dtype == torch.uint8
    assert varied.shape == images.shape
    plain = augment_images(images, "crop_flip", 0, seeded())
    is_varied = (varied != plain).flatten(1).any(1).view(-1, TRIVIALAUGMENT_GROUP).any(1)
    assert 2 <= int(is_varied.sum()) < len(is_varied)  # among the transforms is the identity
    cut = augment_images(images, "crop_flip_trivialaugment_cutout", SIDE, seeded())
    assert bool(((cut == varied) | (cut == 0)).all())
    assert bool((cut == 0).all(1).flatten(1).any(1).all())


def test_augmenting_takes_nothing_from_the_global_generator(split):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for augment in AUGMENTATIONS:
        augment_images(split.images, augment, 8, seeded())
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_augmenting_leaves_the_split_as_it_is(split, augment):
    before = split.images.clone()
    for _ in Loader(split, NORMALIZATION, 8, shuffle=True, augment=augment):
        pass
    assert torch.equal(split.images, before)


def test_evaluation_sees_every_image_once_in_order_and_unchanged(split):
    batches = list(Loader(split, NORMALIZATION, 16))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images, normalize(split.images, NORMALIZATION))


def test_shuffling_keeps_each_image_with_its_label(split):
    seen = []
    for images, labels in Loader(split, IDENTITY, 16, shuffle=True):
        torch.testing.assert_close(images, split.images[labels].float(), rtol=0, atol=1e-3)
        seen += labels.tolist()
    assert sorted(seen) == list(range(50))
    assert seen != list(range(50))


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batches_depend_on_seed_and_epoch_alone(split, augment):
    def drawn(seed, epoch):
        batches = Loader(split, IDENTITY, 16, shuffle=True, augment=augment, seed=seed, epoch=epoch)
        images, labels = zip(*batches, strict=True)
        return torch.cat(images), torch.cat(labels)

    torch.manual_seed(1)
    images, labels = drawn(3, 4)
    torch.manual_seed(2)
    again, again_labels = drawn(3, 4)
    assert torch.equal(images, again)
    assert torch.equal(labels, again_labels)
    for seed, epoch in ((3, 5), (4, 4), (4, 3)):
        _, others = drawn(seed, epoch)
        assert not torch.equal(labels, others)


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "limit", "sizes"),
    [
        (16, False, None, [16, 16, 16, 2]),
        (16, True, None, [16, 16, 16]),
        (25, True, None, [25, 25]),
        (25, False, None, [25, 25]),
        (64, False, None, [50]),
        (64, True, None, []),
        (16, False, 2, [16, 16]),
        (16, False, 2000, [16, 16, 16, 2]),
        (16, True, 2000, [16, 16, 16]),
    ],
)
def test_sizes_of_batches(split, batch_size, drop_last, limit, sizes):
    batches = Loader(split, NORMALIZATION, batch_size, drop_last=drop_last, limit=limit)
    assert len(batches) == len(sizes)
    assert [len(labels) for _, labels in batches] == sizes
    shuffled = replace(batches, shuffle=True)
    assert [len(labels) for _, labels in shuffled] == sizes
