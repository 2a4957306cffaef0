"""An int8 MobileNetV2 as plain tensors: what quantization makes, and every file format is made from.

What int8 means here:

- Activations take all of 0 to 255. ReLU6 is no operation of its own: the range of the convolution before
  it is observed after the ReLU6, so it lies within [0, 6] with zero point 0, and where the convolution
  saturates is the clamp.
- Weights are symmetric (zero point 0), so that a pruned weight is exactly 0 in int8.
- A bias is a whole number of accumulator steps (scale of the input times scale of the weight), without
  needless digits (`bias_units`), so that engines that hold biases as int32 compute the same as those that
  hold floats.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from models import MobileNetV2
from models.folding import INPUT, POOL, Operation, walk

BIAS_UNITS_PER_STEP = 4
"""Biases are rounded to a quarter of a step of their layer's output, or finer."""


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of an activation: real value = (quantized value - zero_point) * scale."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Int8Model:
    """The tensors of an int8 model; layers are named as in the float model.

    Args:
        architecture: the arguments of MobileNetV2.
        weights: int8, in the shape of the float weight, by layer.
        scales: float32 (out_channels,), or (1,) if quantized per tensor, by layer.
        biases: float32 (out_channels,), by layer.
        activations: of the images (INPUT) and of the output of each operation but the pooling.
    """

    architecture: dict[str, Any]
    weights: dict[str, Tensor]
    scales: dict[str, Tensor]
    biases: dict[str, Tensor]
    activations: dict[str, QParams]

    @property
    def per_channel(self) -> bool:
        """Whether each output channel of a weight has a scale of its own."""
        return any(len(scale) > 1 for scale in self.scales.values())

    @property
    def operations(self) -> list[Operation]:
        """The operations in forward order; the layers in them are on the meta device."""
        return operations_of(self.architecture)

    def qparams(self, name: str) -> QParams:
        """Return those of the output of an operation; the pooling keeps those of its input."""
        if name == POOL:
            (name,) = next(op.inputs for op in self.operations if op.name == POOL)
        return self.activations[name]

    def input_scale(self, layer: str) -> float:
        """Return the scale of what a layer takes."""
        (source,) = next(op.inputs for op in self.operations if op.name == layer)
        return self.qparams(source).scale

    def bias_units(self, layer: str) -> Tensor:
        """Return what the biases of a layer are multiples of: float64 (out_channels,) or (1,)."""
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
    """Return what the biases of an int8 layer are multiples of, float64.

    Args:
        steps: float64 (out_channels,) or (1,), of the accumulator: the scale of the input times that
            of the weight.
        output_scale: of the layer.

    Returns:
        The steps, each times the power of two that brings it up to 1/BIAS_UNITS_PER_STEP of the output's
        scale, or just below; larger ones stay.
    """
    ratio = output_scale / BIAS_UNITS_PER_STEP / steps
    return torch.ldexp(steps, (torch.frexp(ratio).exponent - 1).clamp(min=0))
