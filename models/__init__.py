"""The two forms of MobileNetV2: for training and pruning, and for int8 quantization."""

from models.mobilenetv2 import MobileNetV2
from models.mobilenetv2_quantization import MobileNetV2Quantization

__all__ = ["MobileNetV2", "MobileNetV2Quantization"]
