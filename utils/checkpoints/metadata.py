"""The metadata that a file carries about its model, in any format."""

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
    """Metadata of a model.

    Args:
        variant: one of VARIANTS; for weights, their kind.
        engine: quantization engine of an int8 model; None for float.
        architecture: arguments of the model's class.
        class_names: in label order; None if unknown, as for a bare state_dict.
        normalization: normalization of the input images; None if unknown.
        image_size: side in pixels of the images that the model was trained on.
        parameters: number of weights, biases and batch-norm parameters that are not folded.
        nonzeros: number of nonzero parameters.
        macs: multiply-adds per image.
        dense_size_mb: size of all parameters at their precision, in MB.
        nonzero_size_mb: size of the nonzero parameters, without indices, in MB.
        metrics: measured numbers by name.
        versions: versions of the packages that wrote the file.
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
        """Return the fraction of parameters that are nonzero."""
        return self.nonzeros / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """Return the metadata in the form that files store."""
        return plain({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Metadata":
        """Return the metadata from a dictionary of `to_dict`.

        Raises:
            ValueError, KeyError, TypeError: the content is invalid.
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


def parse_normalization(content: dict[str, Any]) -> Normalization:
    """Return the normalization stored in a file.

    Raises:
        ValueError, KeyError, TypeError: it is not three finite means and three positive deviations.
    """
    mean, std = (tuple(map(float, content[name])) for name in ("mean", "std"))
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0):
        raise ValueError(f"the normalization {content} is not three means and three positive deviations")
    return Normalization(mean, std)


def check_image_size(image_size: int) -> None:
    """Check the image size stored in a file.

    Raises:
        ValueError: it is out of range.
    """
    if not 1 <= image_size <= LARGEST_IMAGE_SIZE:
        raise ValueError(f"image_size {image_size} is not between 1 and {LARGEST_IMAGE_SIZE}")
