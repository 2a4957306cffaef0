"""int8 models as packed files: quantized values, scales, zero points and biases.

The stream `ranges` holds the activation scales: that of the images, then of each convolution, linear
layer and addition in forward order. Their zero points are in the header. The stream `scales` holds the
weight scales, one per layer or per output channel, as int8 (`scale_index` minus 128) if that restores the
same float32. Weights have no zero points.

A bias is a whole number of `bias_units` (utils/quantization/int8_model.py rounds it), which follow from
the scales; that number is stored as int32 if it restores the same float32. Only -0.0 comes back as 0.0,
which no kernel tells apart.
"""

import os
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.checkpoints.metadata import Metadata
from utils.common.errors import UserError
from utils.packing.format import ARCHITECTURE_ERRORS, PackedFile, Slot, encode, is_packed
from utils.quantization.int8_model import Int8Model, QParams, activation_names, layer_shapes
from utils.quantization.observers import scale_from_index, scale_index

OUTPUT_SCALES = "output_scales"
STREAM_TYPES = {
    "values": ("int8",),
    "scales": ("int8", "float32"),
    "biases": ("int32", "float32"),
    "ranges": ("float32",),
}
FIRST_INDEX = -128
"""The int8 number of the smallest scale."""


def int8_slots(architecture: dict[str, Any], per_channel: bool) -> list[Slot]:
    """List the slots of an int8 model."""
    layers = layer_shapes(architecture)
    return [
        *(Slot(f"{name}.weight", name, "values", shape) for name, shape in layers.items()),
        *(
            Slot(f"{name}.weight_scale", name, "scales", shape[:1] if per_channel else (1,))
            for name, shape in layers.items()
        ),
        *(Slot(f"{name}.bias", name, "biases", shape[:1]) for name, shape in layers.items()),
        Slot(OUTPUT_SCALES, "", "ranges", (len(activation_names(architecture)),)),
    ]


def encode_int8(model: Int8Model, metadata: Metadata) -> bytes:
    """Return the content of a packed file."""
    arrays = {f"{name}.weight": weight.numpy() for name, weight in model.weights.items()}
    qparams = [model.activations[name] for name in activation_names(model.architecture)]
    arrays[OUTPUT_SCALES] = np.array([one.scale for one in qparams], np.float32)
    indices = {name: _scale_indices(scale) for name, scale in model.scales.items()}
    multiples = {name: _bias_multiples(bias, model.bias_units(name)) for name, bias in model.biases.items()}
    groups = (("weight_scale", model.scales, indices), ("bias", model.biases, multiples))
    for kind, values, integers in groups:
        found = {name: value for name, value in integers.items() if value is not None}
        for name, value in (found if len(found) == len(values) else values).items():
            arrays[f"{name}.{kind}"] = value.numpy()
    header = {
        "dtype": "int8",
        "per_channel": model.per_channel,
        "metadata": metadata.to_dict(),
        "zero_points": [one.zero_point for one in qparams],
    }
    return encode(header, int8_slots(model.architecture, model.per_channel), arrays)


def _scale_indices(scales: Tensor) -> Tensor | None:
    """Return the scales (n,) of a weight as int8, or None if they cannot be restored exactly."""
    indices = scale_index(scales) + FIRST_INDEX
    fits = bool((indices <= 127).all())
    return (
        indices.to(torch.int8)
        if fits and torch.equal(scale_from_index(indices - FIRST_INDEX), scales)
        else None
    )


def _bias_multiples(bias: Tensor, units: Tensor) -> Tensor | None:
    """Return the bias (out_channels,) in units, int32, or None if it cannot be restored exactly."""
    multiples = (bias.double() / units).round()
    fits = bool((multiples.abs() < 2**31).all())
    return multiples.int() if fits and torch.equal((multiples * units).float(), bias) else None


def is_packed_int8(path: str | os.PathLike) -> bool:
    """Return whether the file is a packed int8 model.

    Raises:
        UserError: it is a packed file, but truncated, damaged or of another version.
    """
    return is_packed(path) and PackedFile(path).header.get("dtype") == "int8"


def read_slots(file: PackedFile) -> list[Slot]:
    """List the slots of a packed int8 file.

    Raises:
        UserError: its architecture is invalid, or it holds float weights.
    """
    if file.header.get("dtype") != "int8":
        raise UserError(f"{file.path} holds float weights: a packed int8 model is wanted here")
    try:
        architecture = tuple(file.header["metadata"]["architecture"].items())
        return _slots(architecture, bool(file.header["per_channel"]))
    except ARCHITECTURE_ERRORS as error:
        raise file.wrong(error) from error


@lru_cache(maxsize=8)
def _slots(architecture: tuple[tuple[str, Any], ...], per_channel: bool) -> list[Slot]:
    return int8_slots(dict(architecture), per_channel)


def read_int8(path: str | os.PathLike) -> tuple[Int8Model, Metadata]:
    """Read a packed int8 model.

    Raises:
        UserError: the file is damaged, foreign or of another version, or holds a float model.
    """
    file = PackedFile(path)
    slots = read_slots(file)
    arrays = {name: torch.from_numpy(array) for name, array in file.read(slots, STREAM_TYPES).items()}
    layers = [slot.layer for slot in slots if slot.stream == "values"]
    try:
        metadata = Metadata.from_dict(file.header["metadata"])
        names, zero_points = activation_names(metadata.architecture), map(int, file.header["zero_points"])
        activations = {
            name: QParams(scale, zero_point)
            for name, scale, zero_point in zip(
                names, arrays[OUTPUT_SCALES].tolist(), zero_points, strict=True
            )
        }
        if not all(one.scale > 0 and 0 <= one.zero_point <= 255 for one in activations.values()):
            raise ValueError("an activation has an invalid scale or zero point")
    except ARCHITECTURE_ERRORS as error:
        raise file.wrong(error) from error
    scales = {name: arrays[f"{name}.weight_scale"] for name in layers}
    model = Int8Model(
        architecture=metadata.architecture,
        weights={name: arrays[f"{name}.weight"] for name in layers},
        scales={
            name: scale if scale.is_floating_point() else scale_from_index(scale.int() - FIRST_INDEX)
            for name, scale in scales.items()
        },
        biases={},
        activations=activations,
    )
    biases = {}
    for name in layers:
        bias = arrays[f"{name}.bias"]
        is_float = bias.is_floating_point()
        biases[name] = bias if is_float else (bias.double() * model.bias_units(name)).float()
    return replace(model, biases=biases), metadata
