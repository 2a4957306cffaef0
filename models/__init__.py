"""MobileNetV2 in two forms, for training and pruning and for int8 quantization; ResNet-18 to teach it."""

from models.mobilenetv2 import MobileNetV2
from models.mobilenetv2_quantization import MobileNetV2Quantization
from models.resnet18 import ResNet18

__all__ = ["MobileNetV2", "MobileNetV2Quantization", "ResNet18"]
