"""Corrects the biases of an int8 model by the mean error of each channel on calibration images."""

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.statistics import prunable_layers
from utils.quantization.eager import ending_in_relu6, from_module, to_module
from utils.quantization.int8_model import Int8Model

SMALLEST_SLOPE = 0.1
"""Lower bound of d(mean)/d(bias): the bias of a channel that ReLU6 nearly always clamps must not run away."""


@torch.no_grad()
def correct_biases(
    model: Int8Model, reference: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> Int8Model:
    """Return the int8 model with biases that give each channel the mean it has in the float model.

    Rounding the weights shifts the mean of a channel, and the shifts accumulate over the layers. Empirical
    bias correction (Nagel et al., 2019, appendix D, https://arxiv.org/abs/1906.04721) removes them layer by
    layer, each after the previous ones were corrected. Here this takes one pass over the batches: the n-th
    batch moves the biases by 1/n of the remaining error.

    Args:
        model: runs on the current engine; it is not changed.
        reference: the float model with its batch norms folded; it is not changed.
        batches: batches of training images, preprocessed as for inference.
    """
    # Copies, so that the hooks need not be removed.
    module, reference = to_module(model), copy.deepcopy(reference)
    step, means, slopes = 1.0, dict[str, Tensor](), dict[str, Tensor]()

    def measure(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Record the mean of each channel and an estimate of its derivative by the bias."""
        means[name], slopes[name] = _channel_means(output), torch.ones(())
        if isinstance(layer, nn.ReLU6):
            moving = _channel_means(((output > 0) & (output < 6)).float())
            slopes[name] = moving.clamp(min=SMALLEST_SLOPE)

    def correct(name: str, layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Correct the bias of an int8 layer and return its new output."""
        error = _channel_means(output.dequantize()) - means[name]
        layer.set_weight_bias(layer.weight(), layer.bias() - step * error / slopes[name])
        return layer.forward(*inputs)

    # The float module with the same output as an int8 layer: the ReLU6 after it, or the layer.
    watched: dict[str, nn.Module] = dict(prunable_layers(reference))
    watched |= {f"{name}.0": sequence[-1] for name, sequence in ending_in_relu6(reference).items()}
    for name, layer in watched.items():
        layer.register_forward_hook(partial(measure, name))
        module.get_submodule(name).register_forward_hook(partial(correct, name))
    for number, (images, _) in enumerate(batches, 1):
        step = 1 / number
        reference(images)
        module(images)
    return from_module(module).with_rounded_biases()


def _channel_means(output: Tensor) -> Tensor:
    """Return the means (channels,) of an output (images, channels, ...)."""
    return output.movedim(1, 0).flatten(1).mean(1)
