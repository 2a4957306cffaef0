"""Corrects the biases of an int8 model by the mean error of each channel on calibration images."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from utils.quantization.eager import from_module, to_module
from utils.quantization.int8_model import Int8Model

SMALLEST_SLOPE = 0.1
"""Lower bound of d(mean)/d(bias), so that the bias of a channel that ReLU6 nearly always clamps stays put."""


@torch.no_grad()
def correct_biases(
    model: Int8Model, reference: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> Int8Model:
    """Return the int8 model with biases that give each channel the mean of the float model.

    Rounding the weights shifts the mean of a channel, and the shifts accumulate over the layers. Empirical
    bias correction (Nagel et al., 2019, appendix D, https://arxiv.org/abs/1906.04721) removes them layer by
    layer, each with the previous ones corrected. This does so in one pass over the batches: the n-th batch
    moves the biases by 1/n of the error that is left.

    Args:
        model: runs on the current engine; stays as it is.
        reference: the float model with its batch norms folded.
        batches: of training images, preprocessed as for inference.
    """
    module = to_module(model)
    watched = _watched(reference)
    layers = {name: module.get_submodule(name) for name in watched}
    for number, (images, _) in enumerate(batches, 1):
        means, slopes = _means_and_slopes(reference, watched, images)
        with _hooks(layers, partial(_correct, means, slopes, 1 / number)):
            module(images)
    return from_module(module).with_rounded_biases()


def _correct(
    means: dict[str, Tensor],
    slopes: dict[str, Tensor],
    step: float,
    name: str,
    layer: Any,
    inputs: tuple[Tensor],
    output: Tensor,
) -> Tensor:
    """Forward hook: correct the bias of an int8 layer and return its new output."""
    error = _channel_means(output.dequantize()) - means[name]
    layer.set_weight_bias(layer.weight(), layer.bias() - step * error / slopes[name])
    return layer.forward(*inputs)


def _watched(reference: nn.Module) -> dict[str, nn.Module]:
    """Return, by int8 layer, the float module with the same output: the ReLU6 after it, or the layer."""
    watched: dict[str, nn.Module] = {
        name: layer for name, layer in reference.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    }
    for name, module in reference.named_modules():
        if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.ReLU6):
            watched[f"{name}.0"] = module[-1]
    return watched


def _means_and_slopes(
    reference: nn.Module, watched: dict[str, nn.Module], images: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return, by layer, the mean of each channel and an estimate of its derivative by the bias."""
    means, slopes = {}, {}

    def measure(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        means[name] = _channel_means(output)
        if isinstance(module, nn.ReLU6):
            moving = _channel_means(((output > 0) & (output < 6)).float())
            slopes[name] = moving.clamp(min=SMALLEST_SLOPE)
        else:
            slopes[name] = torch.ones_like(means[name])

    with _hooks(watched, measure):
        reference(images)
    return means, slopes


@contextmanager
def _hooks(modules: dict[str, nn.Module], hook: Callable) -> Iterator[None]:
    """Within the block, call the hook after each module, with its name as the first argument."""
    handles = [module.register_forward_hook(partial(hook, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_means(output: Tensor) -> Tensor:
    """Return the means (channels,) of an output (images, channels, ...)."""
    return output.movedim(1, 0).flatten(1).mean(1)
