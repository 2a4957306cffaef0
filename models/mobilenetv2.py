"""MobileNetV2 (Sandler et al., 2018, https://arxiv.org/abs/1801.04381).

The state_dict has the keys and shapes of torchvision's, so weights move between
`torchvision.models.mobilenet_v2` and this class without conversion.
"""

from typing import Any

import torch
from torch import Tensor, nn

# NOTE: torchvision's strides are meant for 224x224 images. At 32x32 its five halvings leave a 1x1 map,
# so small images need fewer of them. The shapes of the weights do not depend on the choice.
STEM_STRIDES = {32: 2, 16: 1, 8: 1}
STAGE_24_STRIDES = {32: 2, 16: 2, 8: 1}
OUTPUT_STRIDES = tuple(STEM_STRIDES)
FIRST_BLOCK_OF_STAGE_24 = 2


def inverted_residual_settings(output_stride: int) -> list[tuple[int, int, int, int]]:
    """Return table 2 of the paper as rows (expansion t, channels c, repeats n, first stride s)."""
    return [
        # t, c,   n, s
        (1, 16, 1, 1),
        (6, 24, 2, STAGE_24_STRIDES[output_stride]),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]


STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


def round_channels(channels: float, divisor: int = 8) -> int:
    """Round to a multiple of `divisor`, but never down by more than 10 %."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    if rounded < 0.9 * channels:
        rounded += divisor
    return rounded


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return a convolution that preserves the size of the map at stride 1, and its batch norm."""
    padding = (kernel_size - 1) // 2
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]


def conv_bn_relu6(*args: int, **kwargs: int) -> nn.Sequential:
    """Return `conv_bn` followed by ReLU6."""
    return nn.Sequential(*conv_bn(*args, **kwargs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 linear projection; a shortcut where the shapes allow one."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(conv_bn_relu6(in_channels, hidden, kernel_size=1))
        layers.append(conv_bn_relu6(hidden, hidden, stride=stride, groups=hidden))
        layers.extend(conv_bn(hidden, out_channels, kernel_size=1))
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 for images of any size.

    Args:
        num_classes: number of outputs.
        width_mult: multiplies the channels of every layer; 1.0 with 10 classes has 2,236,682
            parameters.
        dropout: probability before the classifier during training.
        output_stride: ratio of the sizes of the image and the last map: 32 (as in torchvision),
            16 (stem at stride 1) or 8 (stem and the 24-channel stage at stride 1).

    Raises:
        ValueError: an argument is out of range.
    """

    block = InvertedResidual

    def __init__(
        self,
        num_classes: int = 10,
        width_mult: float = 1.0,
        dropout: float = 0.2,
        output_stride: int = 16,
    ) -> None:
        super().__init__()
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride {output_stride} must be one of {OUTPUT_STRIDES}")
        if num_classes < 1 or width_mult <= 0 or not 0 <= dropout < 1:
            raise ValueError(
                f"num_classes {num_classes} must be at least 1, width_mult {width_mult} above 0, "
                f"dropout {dropout} in [0, 1)"
            )
        self.architecture: dict[str, Any] = {
            "num_classes": num_classes,
            "width_mult": width_mult,
            "dropout": dropout,
            "output_stride": output_stride,
        }

        channels = round_channels(STEM_CHANNELS * width_mult)
        features: list[nn.Module] = [conv_bn_relu6(3, channels, stride=STEM_STRIDES[output_stride])]
        for t, c, n, s in inverted_residual_settings(output_stride):
            out_channels = round_channels(c * width_mult)
            for i in range(n):
                features.append(self.block(channels, out_channels, s if i == 0 else 1, t))
                channels = out_channels
        head_channels = round_channels(HEAD_CHANNELS * max(1.0, width_mult))
        features.append(conv_bn_relu6(channels, head_channels, kernel_size=1))
        # In narrow models this block has as many input as output channels. It has no shortcut at stride 2,
        # so it must not have one at stride 1: weights have to mean the same at every output stride.
        first_of_stage_24 = features[FIRST_BLOCK_OF_STAGE_24]
        assert isinstance(first_of_stage_24, InvertedResidual)
        first_of_stage_24.use_res_connect = False
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(head_channels, num_classes))
        self._initialize_weights()

    def set_output_stride(self, output_stride: int) -> None:
        """Change the output stride and keep the weights (32 is fastest, 8 most accurate)."""
        self.architecture["output_stride"] = output_stride
        depthwise = f"features.{FIRST_BLOCK_OF_STAGE_24}.conv.1.0"
        for name, strides in (("features.0.0", STEM_STRIDES), (depthwise, STAGE_24_STRIDES)):
            layer = self.get_submodule(name)
            assert isinstance(layer, nn.Conv2d)
            layer.stride = (strides[output_stride],) * 2

    def _initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))
