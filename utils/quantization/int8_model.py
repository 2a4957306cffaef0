"""An int8 MobileNetV2 as plain tensors: the result of quantization and the source of every file format.

Conventions:

- Activations use the values 0 to 255. ReLU6 is not an operation: the range of the convolution before it is
  observed after the ReLU6, so it lies within [0, 6] with zero point 0, and saturation is the clamp.
- Weights are symmetric (zero point 0), so that a pruned weight is exactly 0 in int8.
- A bias is a whole number of accumulator steps (input scale times weight scale), no finer than needed
  (`bias_units`), so that engines with int32 biases compute the same as engines with float biases.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from models import MobileNetV2
from models.folding import INPUT, POOL, Operation, walk

BIAS_UNITS_PER_STEP = 4
"""Biases are rounded to a quarter of an output step of their layer, or finer."""


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of an activation: real value = (quantized value - zero_point) * scale."""

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        """Raise ValueError for an invalid scale or zero point, which a damaged file may hold."""
        if not (0 < self.scale < math.inf and 0 <= self.zero_point <= 255):
            raise ValueError("an activation has an invalid scale or zero point")


@dataclass(frozen=True)
class Int8Model:
    """The tensors of an int8 model; layers are named as in the float model.

    Args:
        architecture: the arguments of MobileNetV2.
        weights: int8, in the shape of the float weight, by layer.
        scales: float32 (out_channels,), or (1,) if quantized per tensor, by layer.
        biases: float32 (out_channels,), by layer.
        activations: qparams of the images (INPUT) and of the output of each operation except the pooling.
    """

    architecture: dict[str, Any]
    weights: dict[str, Tensor]
    scales: dict[str, Tensor]
    biases: dict[str, Tensor]
    activations: dict[str, QParams]

    @property
    def per_channel(self) -> bool:
        """Return whether each output channel of a weight has a scale of its own."""
        return any(len(scale) > 1 for scale in self.scales.values())

    @property
    def operations(self) -> list[Operation]:
        """Return the operations in forward order; the layers in them are on the meta device."""
        return operations_of(self.architecture)

    def qparams(self, name: str) -> QParams:
        """Return the qparams of the output of an operation; the pooling keeps those of its input."""
        if name == POOL:
            (name,) = next(op.inputs for op in self.operations if op.name == POOL)
        return self.activations[name]

    def input_scale(self, layer: str) -> float:
        """Return the scale of the input of a layer."""
        (source,) = next(op.inputs for op in self.operations if op.name == layer)
        return self.qparams(source).scale

    def bias_units(self, layer: str) -> Tensor:
        """Return the `bias_units` of a layer: float64 (out_channels,) or (1,)."""
        steps = self.input_scale(layer) * self.scales[layer].double()
        return bias_units(steps, self.activations[layer].scale)

    def with_rounded_biases(self) -> "Int8Model":
        """Return the model with each bias rounded to whole `bias_units`."""
        rounded = {}
        for name, bias in self.biases.items():
            units = self.bias_units(name)
            rounded[name] = ((bias.double() / units).round() * units).float()
        return replace(self, biases=rounded)

    def dequantized_weights(self) -> dict[str, Tensor]:
        """Return the real values of the weights, float32, by layer."""
        return {
            name: weight.float() * self.scales[name].view(-1, *[1] * (weight.dim() - 1))
            for name, weight in self.weights.items()
        }


def operations_of(architecture: dict[str, Any]) -> list[Operation]:
    """List the operations of a MobileNetV2 without allocating it.

    Raises:
        ValueError, TypeError, ...: what the class raises for an invalid architecture.
    """
    return _operations(tuple(architecture.items()))


def activation_names(architecture: dict[str, Any]) -> list[str]:
    """List the keys of `Int8Model.activations` in forward order."""
    return [INPUT, *(op.name for op in operations_of(architecture) if op.kind != "pool")]


def layer_shapes(architecture: dict[str, Any]) -> dict[str, torch.Size]:
    """Return the shape of the weight of each layer, in forward order."""
    operations = operations_of(architecture)
    return {op.name: op.layer.weight.shape for op in operations if op.layer is not None}


@lru_cache(maxsize=8)
def _operations(architecture: tuple[tuple[str, Any], ...]) -> list[Operation]:
    with torch.device("meta"):
        return walk(MobileNetV2(**dict(architecture)))


def bias_units(steps: Tensor, output_scale: float) -> Tensor:
    """Return the units that the biases of an int8 layer are multiples of, float64.

    Args:
        steps: accumulator steps, the input scale times the weight scale: float64 (out_channels,) or (1,).
        output_scale: of the layer.

    Returns:
        Each step times the largest power of two, at least 1, that keeps it within
        output_scale / BIAS_UNITS_PER_STEP; larger steps stay as they are.
    """
    ratio = output_scale / BIAS_UNITS_PER_STEP / steps
    return torch.ldexp(steps, (torch.frexp(ratio).exponent - 1).clamp(min=0))
