"""What a file says about the model in it, whatever the file's format."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from utils.common.runtime import plain, versions
from utils.data.datasets import Normalization

FORMAT = "mobilenetv2-torchscript"
"""Packed int8 files carry the same metadata under the same name."""
FORMAT_VERSION = 1
LARGEST_IMAGE_SIZE = 4096
VARIANTS = ("float", "ptq_per_tensor", "ptq_per_channel", "qat")


@dataclass(frozen=True)
class Metadata:
    """What is known of a model.

    Args:
        variant: one of VARIANTS; for weights, their kind.
        engine: quantization engine that an int8 model was made for; None for float.
        architecture: the arguments of the model's class.
        class_names: in label order; None if the file has none, as a bare state_dict.
        normalization: of the images that the model takes; None if the file has none.
        image_size: side in pixels of the images that it was made for.
        parameters: number of weights and biases, and of batch-norm parameters where they are not folded.
        nonzeros: how many of them are not zero.
        macs: multiply-adds per image.
        dense_size_mb: size of the parameters at their precision, in MB.
        nonzero_size_mb: size of the nonzero ones, without any index, in MB.
        metrics: measured numbers, by name.
        versions: of the packages that wrote the file.
    """

    variant: str
    engine: str | None
    architecture: dict[str, Any]
    class_names: tuple[str, ...] | None
    normalization: Normalization | None
    image_size: int
    parameters: int
    nonzeros: int
    macs: int
    dense_size_mb: float
    nonzero_size_mb: float
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def density(self) -> float:
        """Fraction of the parameters that are not zero."""
        return self.nonzeros / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """Return the metadata as they stand in a file."""
        return plain({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Metadata":
        """Read back what `to_dict` returned.

        Raises:
            ValueError, KeyError, TypeError: the content is something else.
        """
        if (content["format"], content["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"it has format {content['format']} {content['format_version']}")
        content = {f.name: content[f.name] for f in fields(cls)}
        if content["variant"] not in VARIANTS:
            raise ValueError(f"it has the unknown variant {content['variant']!r}")
        content["normalization"] = parse_normalization(content["normalization"])
        content["class_names"] = tuple(map(str, content["class_names"]))
        for name in ("image_size", "parameters", "nonzeros", "macs"):
            content[name] = int(content[name])
        for name in ("dense_size_mb", "nonzero_size_mb"):
            content[name] = float(content[name])
        classes, outputs = len(content["class_names"]), content["architecture"]["num_classes"]
        if classes != outputs:
            raise ValueError(f"it names {classes} classes for {outputs} outputs")
        check_image_size(content["image_size"])
        return cls(**content)

    @classmethod
    def from_json(cls, text: str) -> "Metadata":
        """Read back the JSON form of `to_dict`; raises as `from_dict`."""
        return cls.from_dict(json.loads(text))


def parse_normalization(content: dict[str, Any]) -> Normalization:
    """Return the normalization in a file.

    Raises:
        ValueError, KeyError, TypeError: it is not three means and three positive deviations.
    """
    mean, std = (tuple(map(float, content[name])) for name in ("mean", "std"))
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0):
        raise ValueError(f"the normalization {content} is not three means and three positive deviations")
    return Normalization(mean, std)


def check_image_size(image_size: int) -> None:
    """Check the image size in a file.

    Raises:
        ValueError: no image has this size.
    """
    if not 1 <= image_size <= LARGEST_IMAGE_SIZE:
        raise ValueError(f"image_size is {image_size}")
