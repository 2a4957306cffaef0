"""One image file, of any size and mode, as RGB pixels."""

import threading
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.common.errors import UserError, one_line

# torchvision's IMG_EXTENSIONS; importing it takes a second.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What a file may be, whatever its name says. Pillow knows more, and starts Ghostscript for one of them."""
LARGE_IMAGE = 2**26
"""Pixels; what is larger takes up to 1.5 GB to decode."""
_decoding_large = threading.Lock()


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
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is none of {', '.join(FORMATS)}"
        raise UserError(f"image {path} cannot be read ({reason}): replace or remove it") from error


def _read_rgb(path: Path, image_size: int) -> Image.Image:
    with (
        # Given a path, Pillow maps some files into memory, and the process dies where one is truncated.
        open(path, "rb") as stream,
        Image.open(stream, formats=FORMATS) as file,
        # A thread per processor decodes: not all of them a large image at once.
        _decoding_large if file.width * file.height > LARGE_IMAGE else nullcontext(),
    ):
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
