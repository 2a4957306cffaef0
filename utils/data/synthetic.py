"""Ten classes of synthetic 32x32 RGB images: the same bytes on every machine.

Each image shows one object of random colour, position, size and rotation on a shaded, cluttered
background, crossed by a bar and covered by noise. Seven classes differ in outline and three in
texture, so colours and single pixels say little: a linear classifier of the pixels reaches 23 %.
"""

from pathlib import Path

import numpy as np
import torch

from utils.data.image_folder import LabelledImages

CLASS_NAMES = (
    "checkerboard",
    "circle",
    "crescent",
    "cross",
    "dots",
    "ring",
    "square",
    "star",
    "stripes",
    "triangle",
)
IMAGE_SIZE = 32
TRAIN_PER_CLASS = 600
TEST_PER_CLASS = 200
TRAIN_SEED = 1
TEST_SEED = 2

# What sets the difficulty. Lengths are in pixels, colours in fractions of 255.
CENTER = (12.0, 20.0)
RADIUS = (5.5, 11.0)
TEXTURE_PERIOD = (5.0, 8.0)
# Objects are brighter than their surroundings: if they could be darker as well, a network would need
# many more epochs than a demonstration has.
DARK = (0.0, 0.5)
BRIGHT = (0.5, 1.0)
SHADING = 0.3
CLUTTER_BARS = 4
NOISE = (0.05, 0.4)

# Pixels are float32 and go only through operations that IEEE 754 rounds correctly, and cosines are
# rounded to this step, so that every processor and library version gives the same bytes.
COSINE_STEP = 2.0**-12


def load(data_dir: Path) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """Draw the training and the test images and return them with the class names.

    Classes alternate, so that any ten images in a row hold all of them. `data_dir` is not used.
    """
    train = _draw_split(TRAIN_PER_CLASS, _Random(TRAIN_SEED))
    test = _draw_split(TEST_PER_CLASS, _Random(TEST_SEED))
    return train, test, list(CLASS_NAMES)


class _Random:
    """Random numbers from a generator's plain doubles and bytes, which every numpy draws alike."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.Generator(np.random.PCG64(seed))

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        return (low + (high - low) * self.generator.random(shape)).astype(np.float32)

    def direction(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the cosines and sines (count, 1, 1) of random angles."""
        angles = 2 * np.pi * self.generator.random((count, 1, 1))
        cosine, sine = (np.round(f(angles) / COSINE_STEP) * COSINE_STEP for f in (np.cos, np.sin))
        return cosine.astype(np.float32), sine.astype(np.float32)

    def noise(self, *shape: int) -> np.ndarray:
        """Return triangular noise in [-1, 1]: the sum of two random bytes, scaled."""
        draws = np.frombuffer(self.generator.bytes(2 * int(np.prod(shape))), np.uint8)
        first, second = draws.reshape(2, *shape)
        return (first.astype(np.float32) + second) / np.float32(255) - np.float32(1)


def _draw_split(per_class: int, random: _Random) -> LabelledImages:
    images = np.stack([_draw(name, per_class, random) for name in CLASS_NAMES], axis=1)
    labels = torch.arange(len(CLASS_NAMES)).repeat(per_class)
    return torch.from_numpy(images).flatten(0, 1), labels


def _draw(name: str, count: int, random: _Random) -> np.ndarray:
    """Return images (count, 32, 32, 3) uint8 of one class."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float32) + np.float32(0.5)
    background = random.uniform(*DARK, count, 1, 1, 3)
    along, _ = _turned(x, y, (16.0, 16.0), random, count)
    image = background + along[..., None] * random.uniform(-SHADING, SHADING, count, 1, 1, 3) / IMAGE_SIZE
    for _ in range(CLUTTER_BARS):
        _paint(image, _bar(x, y, random, count), random.uniform(0, 1, count, 1, 1, 3))
    u, v = _turned(x, y, CENTER, random, count)
    radius = random.uniform(*RADIUS, count, 1, 1)
    color = random.uniform(*BRIGHT, count, 1, 1, 3)
    if name in OUTLINES:
        _paint(image, OUTLINES[name](u, v, radius), color)
    else:
        # Half of the patches are round and half are square, so that only the texture tells the class.
        is_round = random.uniform(0, 1, count, 1, 1) < 0.5
        patch = np.where(is_round, _circle(u, v, radius), _square(u, v, radius))
        period = random.uniform(*TEXTURE_PERIOD, count, 1, 1)
        shift = random.uniform(0, 1, 2, count, 1, 1)
        texture = TEXTURES[name](u / period + shift[0], v / period + shift[1]) * period
        _paint(image, patch, random.uniform(*DARK, count, 1, 1, 3))
        _paint(image, np.maximum(patch, texture), color)
    _paint(image, _bar(x, y, random, count), random.uniform(0, 1, count, 1, 1, 3))
    image += random.noise(*image.shape) * random.uniform(*NOISE, count, 1, 1, 1)
    return np.floor(np.clip(image, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def _turned(x, y, center: tuple[float, float], random: _Random, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates (count, 32, 32) in pixels around a random centre, rotated by a random angle."""
    center_x, center_y = random.uniform(*center, 2, count, 1, 1)
    cosine, sine = random.direction(count)
    x, y = x - center_x, y - center_y
    return x * cosine + y * sine, y * cosine - x * sine


def _paint(image: np.ndarray, distance: np.ndarray, color: np.ndarray) -> None:
    """Colour the pixels at a negative distance, with an anti-aliased edge of one pixel."""
    cover = np.clip(np.float32(0.5) - distance, 0, 1)[..., None]
    image += cover * (color - image)


# Signed distances in pixels to an outline (negative inside), given coordinates around its centre.


def _bar(x, y, random: _Random, count: int) -> np.ndarray:
    u, v = _turned(x, y, (0.0, float(IMAGE_SIZE)), random, count)
    length = random.uniform(0, 8, count, 1, 1)
    width = random.uniform(0.5, 1.8, count, 1, 1)
    return _length(u - np.clip(u, -length, length), v) - width


def _length(u, v) -> np.ndarray:
    return np.sqrt(u * u + v * v)


def _circle(u, v, radius) -> np.ndarray:
    return _length(u, v) - radius


def _ring(u, v, radius) -> np.ndarray:
    return np.abs(_length(u, v) - radius * 0.75) - radius * 0.25


def _crescent(u, v, radius) -> np.ndarray:
    return np.maximum(_circle(u, v, radius), -_circle(u - radius * 0.55, v, radius * 0.85))


def _square(u, v, radius) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - radius * 0.85


def _cross(u, v, radius) -> np.ndarray:
    long, short = np.maximum(np.abs(u), np.abs(v)) - radius, np.minimum(np.abs(u), np.abs(v)) - radius * 0.32
    return np.maximum(long, short)


def _sides(u, v, count: int) -> np.ndarray:
    """Return signed distances (count, ...) to lines through the centre with evenly spaced normals."""
    angles = 2 * np.pi * np.arange(count) / count
    cosines, sines = (np.round(f(angles) / COSINE_STEP) * COSINE_STEP for f in (np.cos, np.sin))
    return np.stack([u * np.float32(c) + v * np.float32(s) for c, s in zip(cosines, sines, strict=True)])


def _triangle(u, v, radius) -> np.ndarray:
    return _sides(u, v, 3).max(0) - radius * 0.6


def _star(u, v, radius) -> np.ndarray:
    # A pentagram is the set of points on the inner side of at least four of its five lines.
    return np.sort(_sides(u, v, 5), axis=0)[-2] - radius * 0.36


OUTLINES = {
    "circle": _circle,
    "crescent": _crescent,
    "cross": _cross,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}


# Signed distances to a texture's edge, in periods, given coordinates in periods.


def _wave(u) -> np.ndarray:
    """Return a triangle wave of period 1 between -1/4 and 1/4."""
    return np.abs(u - np.floor(u) - 0.5) - 0.25


def _stripes(u, v) -> np.ndarray:
    return _wave(u)


def _checkerboard(u, v) -> np.ndarray:
    a, b = _wave(u), _wave(v)
    return np.maximum(np.minimum(a, b), np.minimum(-a, -b))


def _dots(u, v) -> np.ndarray:
    return _length(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5) - 0.3


TEXTURES = {"checkerboard": _checkerboard, "dots": _dots, "stripes": _stripes}
