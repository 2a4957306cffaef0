"""MobileNetV2 for fast evaluation on a CPU, in blocks whose layers can be exchanged one at a time.

Batch norms are folded into the weights. Activations lie as (N, H, W, C). A block takes as many images
at a time as the cache holds.
The logits are those of the model up to float rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import MobileNetV2

CACHE_BYTES_A_THREAD = 3 * 2**22
"""For a block's widest activation; about a core's share of the last level."""


class FoldedLayer:
    """A convolution or linear layer, as its module holds it now, with what stands behind it.

    Args:
        module: the layer of the model.
        batch_norm: behind it, if there is one.
        clamped: whether a ReLU6 ends it.
    """

    def __init__(
        self, module: nn.Conv2d | nn.Linear, batch_norm: nn.BatchNorm2d | None, clamped: bool
    ) -> None:
        self.module, self.batch_norm, self.clamped = module, batch_norm, clamped
        # In double precision, so that folding costs one rounding.
        weight = module.weight.detach().double()
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().double()
        if batch_norm is not None:
            scale = batch_norm.weight.detach() / torch.sqrt(batch_norm.running_var.double() + batch_norm.eps)
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            bias = batch_norm.bias.detach() + (bias - batch_norm.running_mean) * scale
        self.bias = bias.float()
        self.weight = weight.float()
        if weight.dim() == 4:
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)

    def folded_anew(self) -> "FoldedLayer":
        """The layer with the weight that its module has by now."""
        return FoldedLayer(self.module, self.batch_norm, self.clamped)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, H, W, in) to (N, H', W', out), or (N, in) to (N, out)."""
        if isinstance(self.module, nn.Linear):
            x = nn.functional.linear(x, self.weight, self.bias)
        else:
            conv = self.module
            x = nn.functional.conv2d(
                x.permute(0, 3, 1, 2), self.weight, self.bias, conv.stride, conv.padding, 1, conv.groups
            ).permute(0, 2, 3, 1)
        return x.clamp_(0, 6) if self.clamped else x


@dataclass(frozen=True)
class FoldedBlock:
    """Layers that run one after the other.

    Args:
        layers: by the name that the model gives them.
        has_shortcut: whether the input is added to what they give.
        pools: whether they get the mean over each map.
    """

    layers: dict[str, FoldedLayer]
    has_shortcut: bool = False
    pools: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, H, W, in) to (N, H', W', out), or to (N, out) if it pools."""
        name, layer = next(iter(self.layers.items()))
        return self.with_variants(x, name, [layer])[0]

    def with_variants(self, x: Tensor, name: str, variants: Sequence[FoldedLayer]) -> list[Tensor]:
        """What the block makes of `x` with each variant in place of the layer."""
        layers = list(self.layers.values())
        index = list(self.layers).index(name)
        outputs: list[list[Tensor]] = [[] for _ in variants]
        for images in x.split(self._images_in_cache(x)):
            before = images.mean((1, 2)) if self.pools else images
            for layer in layers[:index]:
                before = layer(before)
            for variant, output in zip(variants, outputs, strict=True):
                out = variant(before)
                for layer in layers[index + 1 :]:
                    out = layer(out)
                output.append(out.add_(images) if self.has_shortcut else out)
        return [torch.cat(output) if len(output) > 1 else output[0] for output in outputs]

    def _images_in_cache(self, x: Tensor) -> int:
        positions = x[0, ..., 0].numel()
        widest = max(len(layer.bias) for layer in self.layers.values())
        bytes_an_image = positions * widest * x.element_size()
        return max(1, CACHE_BYTES_A_THREAD * torch.get_num_threads() // bytes_an_image)


def fold_network(model: MobileNetV2) -> list[FoldedBlock]:
    """The blocks of a float model in forward order; the last one pools and classifies."""
    blocks = [
        FoldedBlock(_fold_layers(f"features.{index}", block), getattr(block, "use_res_connect", False))
        for index, block in enumerate(model.features)
    ]
    return [*blocks, FoldedBlock(_fold_layers("classifier", model.classifier), pools=True)]


def _fold_layers(prefix: str, block: nn.Module) -> dict[str, FoldedLayer]:
    kinds = nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.ReLU6
    modules = [(name, module) for name, module in block.named_modules() if isinstance(module, kinds)]
    layers = {}
    for index, (name, module) in enumerate(modules):
        if isinstance(module, nn.Conv2d | nn.Linear):
            batch_norm, activation, *_ = [follower for _, follower in modules[index + 1 :]] + [None, None]
            if not isinstance(batch_norm, nn.BatchNorm2d):
                batch_norm, activation = None, batch_norm
            layers[f"{prefix}.{name}"] = FoldedLayer(module, batch_norm, isinstance(activation, nn.ReLU6))
    return layers
