"""MobileNetV2 for training and pruning, its quantizable form, and ResNet-18 as a teacher."""

from models.mobilenetv2 import MobileNetV2
from models.mobilenetv2_quantization import MobileNetV2Quantization
from models.resnet18 import ResNet18

__all__ = ["MobileNetV2", "MobileNetV2Quantization", "ResNet18"]
