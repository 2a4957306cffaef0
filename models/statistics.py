"""Statistics of a model: parameters, nonzeros, multiply-adds, size."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from utils.common.files import BYTES_PER_MB

BYTES_PER_FLOAT = 4
LAYER_KINDS = ("expansion 1×1", "depthwise 3×3", "projection 1×1", "stem and classifier")


@dataclass(frozen=True)
class LayerStatistics:
    """Name, shape, parameters, nonzeros and multiply-adds of a prunable layer.

    `parameters` counts only the weight, not the bias; `macs` is per image.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    nonzeros: int
    macs: int


@dataclass(frozen=True)
class ModelStatistics:
    """Counts over all parameters (weights, biases, batch-norm scales and shifts)."""

    parameters: int
    nonzeros: int
    macs: int
    layers: tuple[LayerStatistics, ...]

    @property
    def density(self) -> float:
        """Return the fraction of parameters that are nonzero."""
        return self.nonzeros / self.parameters

    @property
    def dense_size_mb(self) -> float:
        """Return the size of all parameters as float32, in MB."""
        return self.parameters * BYTES_PER_FLOAT / BYTES_PER_MB

    @property
    def nonzero_size_mb(self) -> float:
        """Return the size of the nonzero parameters as float32, without indices, in MB; not a file size."""
        return self.nonzeros * BYTES_PER_FLOAT / BYTES_PER_MB


def prunable_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the prunable layers (convolutions and linear layers) by name, in forward order."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }


def count_macs(model: nn.Module, image_size: int) -> dict[str, int]:
    """Return the multiply-adds per layer for one image of `image_size` x `image_size` pixels.

    As is usual, biases, batch norms, activations and pooling are not counted.
    """
    macs: dict[str, int] = {}
    layers = prunable_layers(model)

    def hook_for(name: str):
        def hook(module: nn.Conv2d | nn.Linear, _inputs: tuple, output: torch.Tensor) -> None:
            # Each output element takes one multiply-add per weight of its filter.
            macs[name] = output[0].numel() * module.weight[0].numel()

        return hook

    hooks = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    was_training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, image_size, image_size))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return macs


def model_statistics(model: nn.Module, image_size: int) -> ModelStatistics:
    """Return the statistics of a float model for images of `image_size` x `image_size` pixels."""
    macs = count_macs(model, image_size)
    layers = tuple(
        LayerStatistics(
            name=name,
            shape=tuple(layer.weight.shape),
            parameters=layer.weight.numel(),
            nonzeros=int(torch.count_nonzero(layer.weight)),
            macs=macs[name],
        )
        for name, layer in prunable_layers(model).items()
    )
    parameters = list(model.parameters())
    return ModelStatistics(
        parameters=sum(p.numel() for p in parameters),
        nonzeros=sum(int(torch.count_nonzero(p)) for p in parameters),
        macs=sum(macs.values()),
        layers=layers,
    )


def layer_kind(name: str, shape: Sequence[int]) -> str:
    """Return which of LAYER_KINDS a layer of MobileNetV2 is, judged by the shape of its weight."""
    if len(shape) == 4 and shape[2:] == (1, 1):
        return LAYER_KINDS[0] if shape[0] > shape[1] else LAYER_KINDS[2]
    return LAYER_KINDS[1] if len(shape) == 4 and shape[1] == 1 else LAYER_KINDS[3]
