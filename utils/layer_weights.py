"""What stands in each layer of a model file of any kind: its weight, and its bytes in the file."""

import os

import pandas as pd
import torch
from torch import Tensor, nn

from models import MobileNetV2
from models.statistics import prunable_layers
from utils.deployment.torchscript import graph_operations
from utils.open_model import ModelFile
from utils.packing.pack import is_packed, packed_sizes
from utils.pruning.allocation import folded_weights

WEIGHTED_OPERATIONS = ("quantized::conv2d", "quantized::linear", "aten::_convolution", "aten::linear")
"""Of a frozen TorchScript graph; the second argument holds the layer's weight."""


def has_batch_norms(file: ModelFile) -> bool:
    """Whether batch norms stand behind the convolutions; otherwise they are folded into the weights."""
    return any(isinstance(module, nn.BatchNorm2d) for module in file.model.modules())


def layer_weights(file: ModelFile, fold: bool = False) -> dict[str, Tensor]:
    """The weight of each layer in forward order; int8 ones as quantized tensors.

    Args:
        file: of any kind.
        fold: fold batch norms into the weights, where the file has not done so.
    """
    layers = prunable_layers(file.model)
    if not layers:
        return {name: weight for name, (weight, _) in _graph_parameters(file).items()}
    if fold and has_batch_norms(file):
        return folded_weights(file.model)
    return {name: layer.weight.detach() for name, layer in layers.items()}


def file_bytes(file: ModelFile) -> pd.DataFrame:
    """Where the bytes of a file go.

    Returns:
        As `packed_sizes` gives it for a packed file: a row for each layer and kind, columns `layer`,
        `kind` and `bytes`. Of other files, what is no tensor of a layer counts as header, in a layer
        without a name. The sum of `bytes` is the size of the file.
    """
    if is_packed(file.path):
        return packed_sizes(file.path)
    rows = _module_bytes(file.model) if prunable_layers(file.model) else _graph_bytes(file)
    rows.append(("", "header", os.path.getsize(file.path) - sum(size for _, _, size in rows)))
    sizes = pd.DataFrame(rows, columns=["layer", "kind", "bytes"])
    return sizes.groupby(["layer", "kind"], sort=False, as_index=False).sum()


def _module_bytes(model: nn.Module) -> list[tuple[str, str, int]]:
    layers = prunable_layers(model)
    rows = []
    layer = ""
    for name, module in model.named_modules():
        # A batch norm belongs to the layer in front of it.
        layer = name if name in layers else layer
        kinds = {"weight": "values", "bias": "biases"} if name in layers else {}
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            rows.append((layer, kinds.get(key, "batch_norm"), value.nbytes))
    return rows


def _graph_bytes(file: ModelFile) -> list[tuple[str, str, int]]:
    rows = []
    for name, (weight, bias) in _graph_parameters(file).items():
        rows += [(name, "values", weight.numel() * weight.itemsize), (name, "biases", bias.nbytes)]
        if weight.is_quantized and weight.qscheme() == torch.per_channel_affine:
            scales = weight.q_per_channel_scales().nbytes + weight.q_per_channel_zero_points().nbytes
            rows.append((name, "scales", scales))
    return rows


def _graph_parameters(file: ModelFile) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of each layer of a frozen TorchScript model."""
    with torch.device("meta"):
        names = prunable_layers(MobileNetV2(**file.architecture))
    found = []
    for kind, arguments, _ in graph_operations(file.model):
        if kind in WEIGHTED_OPERATIONS:
            _, weight, bias, *_ = arguments
            # An int8 operation has both in one.
            found.append(weight.unpack() if kind.startswith("quantized") else (weight, bias))
    return dict(zip(names, found, strict=True))
