"""Open float weights from any file that holds them."""

import os
from dataclasses import replace

from models import MobileNetV2, MobileNetV2Quantization
from utils.checkpoints.foreign import read_safetensors
from utils.checkpoints.weights import MOBILENETV2_KINDS, Weights, read_pickle, weights_from_content
from utils.common.files import check_input
from utils.packing.float_weights import read_weights
from utils.packing.format import is_packed


def open_weights(
    path: str | os.PathLike, kinds: str | tuple[str, ...] = "float", output_stride: int | None = None
) -> Weights:
    """Open a weights file and build its model.

    Args:
        path: weights (.pth), packed float weights, or a checkpoint of torchvision's MobileNetV2 (.pth,
            .safetensors).
        kinds: the kind or kinds that the caller accepts, keys of MODEL_CLASSES.
        output_stride: overrides the one in the file; the weights do not depend on it.

    Raises:
        UserError: the file is missing, truncated, not weights, of another kind, or does not fit the
            architecture.
    """
    path = check_input(path, "weights file")
    if path.suffix == ".safetensors":
        content = read_safetensors(path)
    else:
        content = read_weights(path) if is_packed(path) else read_pickle(path)
    return weights_from_content(path, content, kinds, output_stride)


def open_qmodel(path: str | os.PathLike, output_stride: int | None = None) -> Weights:
    """Open weights to quantize: a qmodel, or float weights, which are converted to one.

    Args:
        path: any file that `open_weights` accepts.
        output_stride: overrides the one in the file.

    Raises:
        UserError: as `open_weights`.
    """
    weights = open_weights(path, MOBILENETV2_KINDS, output_stride)
    if weights.kind == "qmodel":
        return weights
    assert isinstance(weights.model, MobileNetV2)
    return replace(weights, model=MobileNetV2Quantization.from_float(weights.model), kind="qmodel")
