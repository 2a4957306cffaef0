"""One image file, of any size and mode, as RGB pixels."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.common.errors import UserError, one_line

# torchvision's IMG_EXTENSIONS; importing it takes a second.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def read_image(path: str | Path, image_size: int) -> np.ndarray:
    """Return an image as (image_size, image_size, 3) uint8, upright, its aspect ratio not kept.

    Grey, palette, transparent and 16-bit images become RGB; the orientation that a camera noted (EXIF) is
    applied.

    Raises:
        UserError: the file is not a regular file, or not an image that can be read.
    """
    path = Path(path)
    if not path.is_file():  # a FIFO would block for ever
        what = "is not a regular file" if path.exists() else "does not exist"
        raise UserError(f"image {path} {what}: replace or remove it")
    try:
        with warnings.catch_warnings():
            # About size; Pillow refuses images of more than 179 million pixels on its own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return np.asarray(_read_rgb(path, image_size))
    except Exception as error:  # on damaged files, decoders raise errors of every kind
        reason = one_line(error)[:120] or type(error).__name__
        raise UserError(f"image {path} cannot be read ({reason}): replace or remove it") from error


def _read_rgb(path: Path, image_size: int) -> Image.Image:
    with Image.open(path) as file:
        image: Image.Image = ImageOps.exif_transpose(file)
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
