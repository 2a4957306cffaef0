"""MobileNetV2 with what int8 quantization needs: quant and dequant stubs, observable additions, fusion.

The state_dict and the float outputs are those of MobileNetV2. ReLU6 stays ReLU6:
utils/quantization/eager.py folds it into the range of the preceding convolution, where it costs nothing.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules_qat

from models.mobilenetv2 import InvertedResidual, MobileNetV2


class InvertedResidualQuantization(InvertedResidual):
    """An inverted residual whose addition has its own range and becomes a single int8 operation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__(in_channels, out_channels, stride, expansion)
        self.skip_add = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        return self.skip_add.add(x, self.conv(x)) if self.use_res_connect else self.conv(x)


class MobileNetV2Quantization(MobileNetV2):
    """A quantizable MobileNetV2 with the same arguments and the same state_dict."""

    block = InvertedResidualQuantization

    def __init__(
        self,
        num_classes: int = 10,
        width_mult: float = 1.0,
        dropout: float = 0.2,
        output_stride: int = 16,
    ) -> None:
        super().__init__(num_classes, width_mult, dropout, output_stride)
        self.quant = QuantStub()
        self.dequant = DeQuantStub()

    @classmethod
    def from_float(cls, model: MobileNetV2) -> "MobileNetV2Quantization":
        """Return a model in eval mode with copies of the weights of a MobileNetV2."""
        quantizable = cls(**model.architecture)
        quantizable.load_state_dict(model.state_dict())
        return quantizable.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized float images (N, 3, H, W) to float logits (N, num_classes)."""
        # TorchScript does not support super().forward.
        x = self.features(self.quant(x))
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        return self.dequant(self.classifier(torch.flatten(x, 1)))

    def fuse_for_qat(self) -> None:
        """Fuse each convolution with its batch norm in place, preserving outputs; both stay trainable."""
        was_training = self.training
        # torch fuses for QAT only in train mode.
        self.train()
        for sequence in [m for m in self.modules() if isinstance(m, nn.Sequential)]:
            for (name, module), (next_name, next_module) in pairwise(list(sequence.named_children())):
                if isinstance(module, nn.Conv2d) and isinstance(next_module, nn.BatchNorm2d):
                    fuse_modules_qat(sequence, [name, next_name], inplace=True)
        self.train(was_training)
