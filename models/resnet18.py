"""torchvision's ResNet-18 (He et al., 2015, https://arxiv.org/abs/1512.03385) for small images.

A teacher: it takes six times the multiply-adds of MobileNetV2, and errs on other images.
"""

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from models.mobilenetv2 import OUTPUT_STRIDES, STEM_STRIDES

STEM_CHANNELS = 64
BLOCKS_A_STAGE = [2, 2, 2, 2]


class ResNet18(ResNet):
    """ResNet-18 for images of any size, with a 3x3 stem in place of the 7x7 one.

    It maps normalized images (N, 3, H, W) to logits (N, num_classes).

    Args:
        num_classes: number of outputs.
        dropout: probability in front of the classifier while training.
        output_stride: how many times smaller the last map is than the image: 32 (stem at stride 2,
            max pooling behind it), 16 (stem at stride 1) or 8 (no pooling either). The weights do
            not depend on it.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.2, output_stride: int = 16) -> None:
        if output_stride not in OUTPUT_STRIDES or num_classes < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"output_stride {output_stride} must be one of {OUTPUT_STRIDES}, num_classes {num_classes} "
                f"at least 1, dropout {dropout} in [0, 1)"
            )
        super().__init__(BasicBlock, BLOCKS_A_STAGE, num_classes, zero_init_residual=True)
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.fc = nn.Sequential(nn.Dropout(dropout), self.fc)
        self.architecture: dict[str, Any] = {"num_classes": num_classes, "dropout": dropout}
        self.set_output_stride(output_stride)

    def set_output_stride(self, output_stride: int) -> None:
        """Run the same weights at another output stride (coarser is faster, finer more accurate)."""
        self.architecture["output_stride"] = output_stride
        self.conv1.stride = (STEM_STRIDES[output_stride],) * 2
        self.maxpool = nn.Identity() if output_stride == 8 else nn.MaxPool2d(3, stride=2, padding=1)
