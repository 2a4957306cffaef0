"""Weights from elsewhere: torchvision's ImageNet weights, and bare state_dicts."""

import urllib.error
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import MobileNetV2
from utils.checkpoints.metadata import MOST_CLASSES
from utils.common.errors import UserError, one_line


def load_pretrained(model: MobileNetV2) -> None:
    """Load torchvision's ImageNet weights into `model`, except for the classifier.

    Raises:
        UserError: the weights cannot be downloaded, or the model has another width.
    """
    import torchvision  # takes a second, and nothing else here needs it

    if model.architecture["width_mult"] != 1.0:
        raise UserError("--pretrained needs --width_mult 1.0: ImageNet weights exist only for that width")
    source = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2
    try:
        state = source.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"the ImageNet weights could not be downloaded from {source.url} ({one_line(error)[:120]}): "
            "connect to the network or leave --pretrained out"
        ) from error
    features = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    model.load_state_dict(features, strict=False)


def architecture_of(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Return the architecture of a bare state_dict, derived from its shapes.

    Raises:
        UserError: the state_dict is not that of a MobileNetV2.
    """
    head, stem = state.get("classifier.1.weight"), state.get("features.0.0.weight")
    if not (isinstance(head, Tensor) and isinstance(stem, Tensor) and head.ndim == 2 and stem.ndim == 4):
        raise UserError(f"{path} is not a MobileNetV2: it lacks classifier.1.weight or features.0.0.weight")
    if not 1 <= head.shape[0] <= MOST_CLASSES:
        raise UserError(f"{path} is not a MobileNetV2: it has {head.shape[0]} classes")
    shapes = {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
    # Channels are rounded to multiples of 8, so trying a few width multipliers is enough.
    for width_mult in (1.0, 1.4, 1.3, 0.75, 0.5, 0.35, 0.25, 0.1, 1.1, 1.2, 1.5, 1.75, 2.0):
        with torch.device("meta"):
            model = MobileNetV2(num_classes=head.shape[0], width_mult=width_mult)
        if all(shapes.get(name) == value.shape for name, value in model.state_dict().items()):
            return model.architecture
    raise UserError(f"{path} is not a MobileNetV2: its tensors have other shapes")
