"""Takes the mean error of each channel of an int8 model out of its biases, with calibration images."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from utils.quantization.eager import from_module, to_module
from utils.quantization.int8_model import Int8Model

SMALLEST_SLOPE = 0.1
"""How a channel's mean follows its bias, at least. One that ReLU6 nearly always clamps would move far."""


@torch.no_grad()
def correct_biases(
    model: Int8Model, reference: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> Int8Model:
    """Return an int8 model whose channels have the means of the float model's.

    Rounded weights shift a channel by a constant on average, and layers add such shifts up. Empirical
    bias correction (Nagel et al., 2019, appendix D, https://arxiv.org/abs/1906.04721) takes them out
    from the first layer to the last, each with those before it corrected. Here it is one pass over the
    batches: the first sets the biases, and the n-th moves them by 1/n of what it still finds.

    Args:
        model: whose biases are to be corrected; it runs on the current engine.
        reference: the float model with its batch norms folded.
        batches: of training images, as the model sees them when it is used.
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
    """Move the bias of an int8 layer, as a forward hook, and return what the layer then computes."""
    error = _channel_means(output.dequantize()) - means[name]
    layer.set_weight_bias(layer.weight(), layer.bias() - step * error / slopes[name])
    return layer.forward(*inputs)


def _watched(reference: nn.Module) -> dict[str, nn.Module]:
    """Return the module whose output each int8 layer imitates: the ReLU6 after it, or itself, by layer."""
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
    """Return the mean of each channel and about how much it grows with the bias, by layer."""
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
    """Within the block, call the hook after each module, with its name before what torch passes."""
    handles = [module.register_forward_hook(partial(hook, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_means(output: Tensor) -> Tensor:
    """Return the means (channels,) of an output (images, channels, ...)."""
    return output.movedim(1, 0).flatten(1).mean(1)
