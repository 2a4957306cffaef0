"""ResNet-18 (He et al., 2015, https://arxiv.org/abs/1512.03385) for small images.

A teacher: it takes six times the multiply-adds of MobileNetV2 and makes different mistakes. The
state_dict has torchvision's keys, except that the stem is 3x3 and dropout precedes the last layer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.mobilenetv2 import OUTPUT_STRIDES, STEM_STRIDES

STEM_CHANNELS = 64


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that preserves the size of the map at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = conv(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(residual + self.downsample(x))


def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return two blocks; the first changes the number of channels and the size."""
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride), BasicBlock(out_channels, out_channels, stride=1)
    )


class ResNet18(nn.Module):
    """ResNet-18 for images of any size, with a 3x3 stem in place of the 7x7 one.

    Args:
        num_classes: number of outputs.
        dropout: probability before the last layer during training.
        output_stride: ratio of the sizes of the image and the last map: 32 (stem at stride 2, then max
            pooling), 16 (stem at stride 1) or 8 (no pooling either). The shapes of the weights do not
            depend on it.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.2, output_stride: int = 16) -> None:
        super().__init__()
        if output_stride not in OUTPUT_STRIDES or num_classes < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"output_stride {output_stride} must be one of {OUTPUT_STRIDES}, num_classes {num_classes} "
                f"at least 1, dropout {dropout} in [0, 1)"
            )
        self.architecture: dict[str, Any] = {"num_classes": num_classes, "dropout": dropout}
        self.conv1 = conv(3, STEM_CHANNELS, kernel_size=7)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.relu = nn.ReLU()
        self.layer1 = stage(STEM_CHANNELS, 64, stride=1)
        self.layer2 = stage(64, 128, stride=2)
        self.layer3 = stage(128, 256, stride=2)
        self.layer4 = stage(256, 512, stride=2)
        self.fc = nn.Sequential(nn.Dropout(dropout), nn.Linear(512, num_classes))
        self._initialize_weights()
        # NOTE: a 7x7 stem is meant for images of 224x224; small ones need 3x3. Replaced only after
        # initialization, as one would in torchvision's model, so a seed gives the same weights as there.
        self.conv1 = conv(3, STEM_CHANNELS, kernel_size=3)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out")
        self.set_output_stride(output_stride)

    def _initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, BasicBlock):
                # Each block starts as its shortcut (Goyal et al., 2017, https://arxiv.org/abs/1706.02677).
                nn.init.zeros_(module.bn2.weight)

    def set_output_stride(self, output_stride: int) -> None:
        """Change the output stride and keep the weights (32 is fastest, 8 most accurate)."""
        self.architecture["output_stride"] = output_stride
        self.conv1.stride = (STEM_STRIDES[output_stride],) * 2
        self.maxpool: nn.Module = nn.Identity()
        if output_stride != 8:
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        return self.fc(torch.flatten(x, 1))
