"""int8 models as packed files: the int8 weights of a TorchScript file, and all that scales them.

What comes back is built anew from its tensors and answers bit for bit as the TorchScript file did.

The stream `ranges` holds the scales of the activations (the images', then those of each convolution,
linear layer and addition, in forward order); their zero points stand in the header. The stream `scales`
holds those of each weight, one, or one an output channel: their numbers (`scale_codes`) less 128 as int8,
if the same float32 comes out of them. Zero points of weights are 0.

A bias is a whole number of `bias_units` of its layer (utils/quantization/eager.py, which rounds it so), which
follow from the scales: that int32 is stored, if the same float32 comes out of it. The only difference
that may be is that a bias of -0.0 comes back as 0.0, which no kernel tells apart.
"""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import MobileNetV2Quantization
from models.statistics import prunable_layers
from utils.checkpoints.weights import LARGEST_IMAGE_SIZE
from utils.common.errors import UserError
from utils.deployment.torchscript import ScriptMetadata, engine_of, graph_operations, to_torchscript
from utils.packing.format import ARCHITECTURE_ERRORS, PackedFile, Slot, encode, is_packed
from utils.quantization.eager import bias_units, int8_model, int8_operations, scale_codes, scale_of

OUTPUT_SCALES = "output_scales"
STREAM_TYPES = {
    "values": ("int8",),
    "scales": ("int8", "float32"),
    "biases": ("int32", "float32"),
    "ranges": ("float32",),
}
FIRST_CODE = -128
"""As int8, of the smallest scale."""
SIDE = 32
"""Pixels of the image that a model is traced with; it takes any."""


@dataclass(frozen=True)
class Int8Tensors:
    """What an int8 model consists of.

    Args:
        weights: qint8, by layer.
        biases: float32 (out_channels,), by layer.
        ranges: scale and zero point of the output of each of `int8_operations`.
    """

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    ranges: dict[str, tuple[float, int]]

    @property
    def per_channel(self) -> bool:
        """Whether each output channel of a weight has a scale of its own."""
        return next(iter(self.weights.values())).qscheme() == torch.per_channel_affine

    def scales(self, layer: str) -> Tensor:
        """Of a weight, float64: (out_channels,) or (1,)."""
        weight = self.weights[layer]
        if self.per_channel:
            return weight.q_per_channel_scales().double()
        return torch.tensor([weight.q_scale()], dtype=torch.float64)

    def bias_units(self, layer: str) -> Tensor:
        """Of what its biases are multiples, float64: (out_channels,) or (1,)."""
        return layer_bias_units(self.ranges, layer, self.scales(layer))


def layer_bias_units(ranges: dict[str, tuple[float, int]], layer: str, scales: Tensor) -> Tensor:
    """Of what a layer's biases are multiples; its input is the output of the operation before it."""
    names = list(ranges)
    input_scale, _ = ranges[names[names.index(layer) - 1]]
    output_scale, _ = ranges[layer]
    return bias_units(input_scale * scales, output_scale)


def empty_model(architecture: dict) -> MobileNetV2Quantization:
    """A model for which no memory is taken."""
    with torch.device("meta"):
        return MobileNetV2Quantization(**architecture)


def int8_slots(model: MobileNetV2Quantization, per_channel: bool) -> list[Slot]:
    """Places for the tensors of an int8 model."""
    layers = {name: tuple(layer.weight.shape) for name, layer in prunable_layers(model).items()}
    return [
        *(Slot(f"{name}.weight", name, "values", shape) for name, shape in layers.items()),
        *(
            Slot(f"{name}.weight_scale", name, "scales", shape[:1] if per_channel else (1,))
            for name, shape in layers.items()
        ),
        *(Slot(f"{name}.bias", name, "biases", shape[:1]) for name, shape in layers.items()),
        Slot(OUTPUT_SCALES, "", "ranges", (len(int8_operations(model)),)),
    ]


def int8_tensors(scripted: torch.jit.ScriptModule, model: MobileNetV2Quantization) -> Int8Tensors:
    """Read the tensors out of the graph of an int8 TorchScript model.

    Args:
        scripted: of `to_torchscript`.
        model: of its architecture, for the names.

    Raises:
        ValueError: the graph is that of another model.
    """
    unpack = {
        "quantized::conv2d": torch.ops.quantized.conv2d_unpack,
        "quantized::linear": torch.ops.quantized.linear_unpack,
    }
    names = iter(int8_operations(model))
    tensors = Int8Tensors({}, {}, {})
    for kind, arguments, _ in graph_operations(scripted):
        if kind in unpack:
            name = next(names, "")
            tensors.weights[name], tensors.biases[name] = unpack[kind](arguments[1])
        elif kind in ("aten::quantize_per_tensor", "quantized::add"):
            name = next(names, "")
        else:
            continue
        scale, zero_point = arguments[1:3] if kind == "aten::quantize_per_tensor" else arguments[2:4]
        tensors.ranges[name] = float(scale), int(zero_point)
    if next(names, None) is not None or list(tensors.weights) != list(prunable_layers(model)):
        raise ValueError("its graph is not that of an int8 MobileNetV2 of its architecture")
    return tensors


def encode_int8(scripted: torch.jit.ScriptModule, metadata: ScriptMetadata) -> bytes:
    """The content of a packed file of an int8 TorchScript model.

    Raises:
        ValueError: the graph is that of another model, or a scale is no float32.
    """
    model = empty_model(metadata.architecture)
    tensors = int8_tensors(scripted, model)
    scales = {name: _float32(name, tensors.scales(name)) for name in tensors.weights}
    output_scales = torch.tensor([scale for scale, _ in tensors.ranges.values()], dtype=torch.float64)
    arrays = {f"{name}.weight": weight.int_repr().numpy() for name, weight in tensors.weights.items()}
    arrays[OUTPUT_SCALES] = _float32(OUTPUT_SCALES, output_scales).numpy()
    biases = {name: bias.detach() for name, bias in tensors.biases.items()}
    bias_codes = {name: _bias_codes(bias, tensors.bias_units(name)) for name, bias in biases.items()}
    for kind, values, codes in (
        ("weight_scale", scales, {name: _scale_codes(scale) for name, scale in scales.items()}),
        ("bias", biases, bias_codes),
    ):
        are_codes = all(code is not None for code in codes.values())
        for name, value in (codes if are_codes else values).items():
            arrays[f"{name}.{kind}"] = value.numpy()
    header = {
        "dtype": "int8",
        "per_channel": tensors.per_channel,
        "metadata": json.loads(metadata.to_json()),
        "zero_points": [zero_point for _, zero_point in tensors.ranges.values()],
    }
    return encode(header, int8_slots(model, tensors.per_channel), arrays)


def _float32(name: str, values: Tensor) -> Tensor:
    if not torch.equal(values.float().double(), values):
        raise ValueError(f"{name} has values that are no float32")
    return values.float()


def _scale_codes(scales: Tensor) -> Tensor | None:
    """The scales (n,) of a weight as int8; None if others come out of it."""
    codes = scale_codes(scales) + FIRST_CODE
    fits = bool((codes <= 127).all())
    return codes.to(torch.int8) if fits and torch.equal(scale_of(codes - FIRST_CODE), scales) else None


def _bias_codes(bias: Tensor, units: Tensor) -> Tensor | None:
    """The bias (out_channels,) as a whole number of units, int32; None if another one comes out of it."""
    codes = (bias.double() / units).round()
    fits = bool((codes.abs() < 2**31).all())
    return codes.int() if fits and torch.equal((codes * units).float(), bias) else None


def is_packed_int8(path: str | os.PathLike) -> bool:
    """Whether the file is a packed int8 model.

    Raises:
        UserError: it is a packed file, but truncated, damaged or of another version.
    """
    return is_packed(path) and PackedFile(path).header.get("dtype") == "int8"


def read_slots(file: PackedFile) -> list[Slot]:
    """The places for tensors in a packed int8 file.

    Raises:
        UserError: its architecture is none, or it holds float weights.
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
    return int8_slots(empty_model(dict(architecture)), per_channel)


def load_int8(path: str | os.PathLike) -> tuple[torch.jit.ScriptModule, ScriptMetadata]:
    """Open a packed int8 model as the TorchScript model that it was made from.

    Raises:
        UserError: the file is damaged, foreign or of another version, holds a float model, or its engine
            does not run on this machine.
    """
    file = PackedFile(path)
    arrays = file.read(read_slots(file), STREAM_TYPES)
    try:
        metadata = ScriptMetadata.from_json(json.dumps(file.header["metadata"]))
        model = empty_model(metadata.architecture)
        scales, zero_points = arrays[OUTPUT_SCALES].tolist(), file.header["zero_points"]
        names = int8_operations(model)
        ranges = {n: (s, z) for n, s, z in zip(names, scales, map(int, zero_points), strict=True)}
        if not all(scale > 0 and 0 <= zero_point <= 255 for scale, zero_point in ranges.values()):
            raise ValueError("an activation has no range")
        if len(metadata.class_names) != metadata.architecture["num_classes"]:
            raise ValueError(f"it names {len(metadata.class_names)} classes for another number of outputs")
        if not 1 <= metadata.image_size <= LARGEST_IMAGE_SIZE:
            raise ValueError(f"image_size is {metadata.image_size}")
    except ARCHITECTURE_ERRORS as error:
        raise file.wrong(error) from error
    with engine_of(path, metadata):
        weights, biases = _weights_and_biases(
            arrays, ranges, list(prunable_layers(model)), bool(file.header["per_channel"])
        )
        return to_torchscript(int8_model(model, weights, biases, ranges), SIDE), metadata


def _weights_and_biases(
    arrays: dict[str, np.ndarray], ranges: dict[str, tuple[float, int]], layers: list[str], per_channel: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights, biases = {}, {}
    for name in layers:
        codes, scale, bias = (
            torch.from_numpy(arrays[f"{name}.{what}"]) for what in ("weight", "weight_scale", "bias")
        )
        scale = (scale if scale.is_floating_point() else scale_of(scale.int() - FIRST_CODE)).double()
        if per_channel:
            zero_points = torch.zeros(len(scale), dtype=torch.int64)
            weights[name] = torch._make_per_channel_quantized_tensor(codes, scale, zero_points, 0)
        else:
            weights[name] = torch._make_per_tensor_quantized_tensor(codes, scale.item(), 0)
        if bias.is_floating_point():
            biases[name] = bias
        else:
            biases[name] = (bias.double() * layer_bias_units(ranges, name, scale)).float()
    return weights, biases
