"""ImageNet weights to start from."""

import urllib.error

import torchvision
from torch import nn

from utils.common.errors import UserError, one_line


def load_pretrained(model: nn.Module) -> None:
    """Load torchvision's ImageNet weights into `model`, all but the classifier.

    Raises:
        UserError: the weights cannot be fetched, or are of another width.
    """
    if model.architecture["width_mult"] != 1.0:
        raise UserError(
            "--pretrained goes with --width_mult 1.0: there are ImageNet weights of that width only"
        )
    source = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2
    try:
        state = source.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"the ImageNet weights could not be fetched from {source.url} ({one_line(error)[:120]}): "
            "connect to the network or leave --pretrained out"
        ) from error
    features = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    model.load_state_dict(features, strict=False)
