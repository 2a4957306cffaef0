"""The network as a list of operations, and batch norms folded into the weights."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.mobilenetv2 import MobileNetV2
from models.statistics import prunable_layers

INPUT, POOL = "images", "pool"
NEGLIGIBLE_DEVIATION = 0.01
"""Channels whose standard deviation after their batch norm is below this (under half an int8 step over
[0, 6]) are treated as constant."""


@dataclass(frozen=True)
class Operation:
    """One step of the network.

    Args:
        kind: "convolution", "linear", "add" or "pool" (global average pooling).
        name: the name of its module in the model; POOL for the pooling, which has no module.
        inputs: names of the operations whose outputs it takes; INPUT stands for the images.
        layer: the convolution or linear layer; None for other kinds.
        has_relu6: whether the output is clamped to [0, 6].
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    layer: nn.Conv2d | nn.Linear | None = None
    has_relu6: bool = False


def walk(model: MobileNetV2) -> list[Operation]:
    """Return the operations of a float model in forward order; batch norms count as part of convolutions."""
    operations: list[Operation] = []
    entering = INPUT
    for index, block in enumerate(model.features):
        last = entering
        for name, module in block.named_modules(prefix=f"features.{index}"):
            if isinstance(module, nn.Conv2d):
                sequence = model.get_submodule(name.rpartition(".")[0])
                assert isinstance(sequence, nn.Sequential)
                has_relu6 = isinstance(sequence[-1], nn.ReLU6)
                operations.append(Operation("convolution", name, (last,), module, has_relu6))
                last = name
        if getattr(block, "use_res_connect", False):
            name = f"features.{index}.skip_add"
            operations.append(Operation("add", name, (entering, last)))
            last = name
        entering = last
    operations.append(Operation("pool", POOL, (entering,)))
    classifier = model.classifier[-1]
    assert isinstance(classifier, nn.Linear)
    operations.append(Operation("linear", f"classifier.{len(model.classifier) - 1}", (POOL,), classifier))
    return operations


def fold_batch_norms(model: MobileNetV2) -> MobileNetV2:
    """Return an equivalent copy in eval mode, with batch norms folded into the convolutions."""
    folded = copy.deepcopy(model).eval()
    for sequence in [module for module in folded.modules() if isinstance(module, nn.Sequential)]:
        for index in range(len(sequence) - 1):
            convolution, norm = sequence[index], sequence[index + 1]
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                sequence[index] = fuse_conv_bn_eval(convolution, norm)
                sequence[index + 1] = nn.Identity()
    return folded


@torch.no_grad()
def without_constant_channels(model: MobileNetV2) -> MobileNetV2:
    """Return a copy of a float model with nearly constant channels made constant.

    If the input of a convolution is dead, its batch norm divides by a variance close to zero. The folded
    weight is then hundreds of times larger than the others but adds nothing to the output, and a
    per-tensor scale that covers it rounds the others to zero.
    """
    model = copy.deepcopy(model)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_var is not None
            deviation = norm.weight.abs() * (norm.running_var / (norm.running_var + norm.eps)).sqrt()
            norm.weight[deviation < NEGLIGIBLE_DEVIATION] = 0
    return model


def folded_weights(model: MobileNetV2) -> dict[str, Tensor]:
    """Return the weight of each layer with its batch norm folded in, and constant channels set to zero."""
    folded = fold_batch_norms(without_constant_channels(model))
    return {name: layer.weight.detach() for name, layer in prunable_layers(folded).items()}
