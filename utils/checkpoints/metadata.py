"""The metadata that a file carries about its model, in any format."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from utils.common.runtime import plain, versions
from utils.data.datasets import Normalization

FORMAT = "mobilenetv2-torchscript"
"""Packed int8 files carry the same metadata under the same name."""
FORMAT_VERSION = 1
LARGEST_IMAGE_SIZE = 1024
MOST_CLASSES = 100_000
DEEPEST, MOST_VALUES, LONGEST_TEXT = 8, 100_000, 10_000
"""Levels of lists and dictionaries in plain values, all values in them, and characters of each text."""
LARGEST_INTEGER = 2**63
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
        check_plain(content)
        check_metrics(content["metrics"])
        check_metrics(content["versions"])
        if not isinstance(content["engine"], str | None) or (content["engine"] is None) != (
            content["variant"] == "float"
        ):
            raise ValueError(f"it has the engine {shown(content['engine'])} for {content['variant']}")
        check_architecture(content["architecture"])
        content["normalization"] = parse_normalization(content["normalization"])
        content["class_names"] = parse_class_names(
            content["class_names"], content["architecture"]["num_classes"]
        )
        check_image_size(content["image_size"])
        for name in ("parameters", "macs", "nonzeros", "dense_size_mb", "nonzero_size_mb"):
            if not _is_number(content[name]) or content[name] < (name in ("parameters", "macs")):
                raise ValueError(f"{name} is {content[name]!r}")
        if content["nonzeros"] > content["parameters"]:
            raise ValueError(f"{content['nonzeros']} of {content['parameters']} parameters are not zero")
        return cls(**content)


def parse_normalization(content: dict[str, Any]) -> Normalization:
    """Return the normalization stored in a file.

    Raises:
        ValueError, KeyError, TypeError: it is not three means and three positive deviations.
    """
    check_plain(content)
    mean, std = (tuple(content[name]) for name in ("mean", "std"))
    if not all(map(_is_number, mean + std)):
        raise ValueError(f"the normalization {content} is not numbers")
    return Normalization(mean, std)


def check_image_size(image_size: int) -> None:
    """Check the image size stored in a file.

    Raises:
        ValueError: it is out of range.
    """
    if not (type(image_size) is int and 1 <= image_size <= LARGEST_IMAGE_SIZE):
        raise ValueError(f"image_size {shown(image_size)} is not between 1 and {LARGEST_IMAGE_SIZE}")


def check_architecture(architecture: Any) -> None:
    """Check the arguments of a model's class that a file stores, before a model is built from them.

    Raises:
        ValueError: one is of another type or out of range.
    """
    if not isinstance(architecture, dict):
        raise ValueError(f"the architecture is a {type(architecture).__name__}")
    bounds = {
        "num_classes": (int, 1, MOST_CLASSES),
        "width_mult": (float, 0.01, 10),
        "dropout": (float, 0, 1),
        "output_stride": (int, 8, 32),
    }
    for name, value in architecture.items():
        kind, low, high = bounds.get(name, (int, 0, -1)) if isinstance(name, str) else (int, 0, -1)
        if type(value) not in (int, kind) or not low <= value <= high:
            raise ValueError(f"the architecture has {shown(name)} {shown(value)}")
    if "num_classes" not in architecture:
        raise ValueError("the architecture has no num_classes")


def parse_class_names(names: Any, num_classes: int) -> tuple[str, ...]:
    """Return the class names stored in a file.

    Raises:
        ValueError: they are not one text per output.
    """
    if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise ValueError("the class names are not texts")
    if len(names) != num_classes:
        raise ValueError(f"it names {len(names)} classes for {num_classes} outputs")
    return tuple(names)


def check_metrics(metrics: Any) -> None:
    """Check that a file stores plain values by name.

    Raises:
        ValueError: it does not, or too many of them.
    """
    if not (isinstance(metrics, dict) and all(isinstance(name, str) for name in metrics)):
        raise ValueError(f"its metrics or versions are not values by name but {shown(metrics)}")
    check_plain(metrics)


def check_plain(value: Any) -> None:
    """Check that a value consists of numbers, texts, lists and dictionaries, as JSON does.

    Raises:
        ValueError: it does not, it is too large, or it is nested too deeply (perhaps in itself).
    """
    unchecked, count = [(value, DEEPEST)], 0
    while unchecked:
        value, depth = unchecked.pop()
        # Counted, since a list that holds another one many times is as large as its copies would be.
        count += 1
        if depth == 0 or count > MOST_VALUES:
            raise ValueError("its metadata is too large or nested too deeply")
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        if isinstance(value, list | tuple):
            unchecked += ((item, depth - 1) for item in value[: MOST_VALUES + 1])
        elif isinstance(value, str):
            if len(value) > LONGEST_TEXT:
                raise ValueError(f"its metadata holds a text of {len(value)} characters")
        elif not (value is None or isinstance(value, bool) or _is_number(value)):
            raise ValueError(f"its metadata holds {shown(value)}")


def shown(value: Any) -> str:
    """Return a value of a file for a message: itself if it is short and plain, else its type."""
    if value is None or isinstance(value, str | bool | float) or _is_number(value):
        return f"{value!r:.80}"
    return f"a {type(value).__name__}"


def _is_number(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is int and abs(value) <= LARGEST_INTEGER
