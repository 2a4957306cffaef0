"""Packed files of int8 models: quantized values, scales, zero points and biases.

The stream `ranges` holds the activation scales: first that of the images, then those of the convolutions,
linear layers and additions in forward order. Their zero points are in the header. The stream `scales`
holds the weight scales, one per layer or per output channel, as int8 (`scale_index` minus 128) if that
restores the same float32. Weights have no zero points.

A bias is a whole number of `bias_units` (utils/quantization/int8_model.py rounds it), which follow from
the scales; that number is stored as int32 if it restores the same float32. Only -0.0 comes back as 0.0,
which makes no difference to any kernel.
"""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.checkpoints.metadata import Metadata
from utils.packing.container import reading
from utils.packing.format import PackedFile, Slot, encode, is_packed
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
    qparams = [model.activations[name] for name in activation_names(model.architecture)]
    indices = {name: _scale_indices(scale) for name, scale in model.scales.items()}
    multiples = {name: _bias_multiples(bias, model.bias_units(name)) for name, bias in model.biases.items()}
    groups: dict[str, dict[str, Any]] = {
        "weight": model.weights,
        "weight_scale": model.scales if None in indices.values() else indices,
        "bias": model.biases if None in multiples.values() else multiples,
    }
    arrays = {f"{name}.{kind}": one.numpy() for kind, group in groups.items() for name, one in group.items()}
    arrays[OUTPUT_SCALES] = np.array([one.scale for one in qparams], np.float32)
    header = {
        "dtype": "int8",
        "per_channel": model.per_channel,
        "metadata": metadata.to_dict(),
        "zero_points": [one.zero_point for one in qparams],
    }
    return encode(header, int8_slots(model.architecture, model.per_channel), arrays)


def _scale_indices(scales: Tensor) -> Tensor | None:
    """Return the scales (n,) of a weight as int8, or None if they cannot be restored exactly."""
    indices = (scale_index(scales) + FIRST_INDEX).to(torch.int8)
    return indices if torch.equal(_scales(indices), scales) else None


def _scales(indices: Tensor) -> Tensor:
    """Return the float32 scales; the inverse of `_scale_indices`."""
    return scale_from_index(indices.int() - FIRST_INDEX)


def _bias_multiples(bias: Tensor, units: Tensor) -> Tensor | None:
    """Return the bias (out_channels,) in units, int32, or None if it cannot be restored exactly."""
    multiples = (bias.double() / units).round().int()
    return multiples if torch.equal(_bias(multiples, units), bias) else None


def _bias(multiples: Tensor, units: Tensor) -> Tensor:
    """Return the float32 bias; the inverse of `_bias_multiples`."""
    return (multiples.double() * units).float()


def is_packed_int8(path: str | os.PathLike) -> bool:
    """Return whether the file is a packed int8 model.

    Raises:
        UserError: it is a packed file, but truncated, damaged or of another version.
    """
    with reading(path):
        return is_packed(path) and PackedFile(path).header["dtype"] == "int8"


def read_tensors(file: PackedFile) -> tuple[list[Slot], dict[str, np.ndarray]]:
    """Return the slots of a packed int8 file, and its tensors by name.

    Raises:
        ValueError, KeyError, ...: the file is damaged.
    """
    slots = int8_slots(file.header["metadata"]["architecture"], bool(file.header["per_channel"]))
    return slots, file.read(slots, STREAM_TYPES)


def read_int8(path: str | os.PathLike) -> tuple[Int8Model, Metadata]:
    """Read a packed int8 model.

    Raises:
        UserError: the file is damaged, foreign or of another version.
    """
    with reading(path):
        file = PackedFile(path)
        _, arrays = read_tensors(file)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        metadata = Metadata.from_dict(file.header["metadata"])
        if metadata.engine is None:
            raise ValueError("it names no engine")
        ranges = zip(tensors[OUTPUT_SCALES].tolist(), map(int, file.header["zero_points"]), strict=True)
        names, layers = activation_names(metadata.architecture), layer_shapes(metadata.architecture)
        scales = {name: tensors[f"{name}.weight_scale"] for name in layers}
        model = Int8Model(
            architecture=metadata.architecture,
            weights={name: tensors[f"{name}.weight"] for name in layers},
            scales={n: one if one.is_floating_point() else _scales(one) for n, one in scales.items()},
            biases={name: tensors[f"{name}.bias"] for name in layers},
            activations={name: QParams(*one) for name, one in zip(names, ranges, strict=True)},
        )
        for name, bias in model.biases.items():
            if not bias.is_floating_point():
                model.biases[name] = _bias(bias, model.bias_units(name))
    return model, metadata
