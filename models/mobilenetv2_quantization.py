class MobileNetV2Quantization:
    pass
