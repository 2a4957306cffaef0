"""Weights from elsewhere: torchvision's ImageNet weights, and state_dicts in other people's checkpoints."""

import math
import re
import urllib.error
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import MobileNetV2
from models.mobilenetv2 import STEM_CHANNELS, round_channels
from utils.checkpoints.metadata import MOST_CLASSES
from utils.common.errors import UserError, one_line
from utils.common.optional_packages import import_optional

WRAPPERS = (
    "model_ema",
    "ema_state_dict",
    "state_dict_ema",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
)
"""The keys under which checkpoints hold a state_dict, the preferred first."""
DEEPEST_WRAPPER = 4
LEFTOVERS = ("total_ops", "total_params", "n_averaged")
"""What counting tools and averaged models add to a state_dict."""
STEM = re.compile(r"(^|\.)features\.0\.0\.weight(_orig)?$")
COMMON_WIDTHS = (1.0, 1.4, 1.3, 0.75, 0.5, 0.35, 0.25)


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


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: the package safetensors is missing, or the file is damaged.
    """
    (safetensors,) = import_optional("safetensors.torch", install="safetensors")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # the package's own exceptions, and those of the system
        raise UserError(f"{path} is no safetensors file or damaged ({one_line(error)[:120]})") from error


def unwrap(path: Path, content: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state_dict of a MobileNetV2 in someone's checkpoint, and what was done to get it.

    Known are dictionaries around it (the average of the weights is preferred), prefixes of DataParallel,
    torch.compile, Lightning and averaged models, what torch.nn.utils.prune and counting tools leave, and
    other floating-point types.

    Raises:
        UserError: it holds another model, or none; the message says what it holds.
    """
    state, notes = content, []
    for _ in range(DEEPEST_WRAPPER):  # a dictionary may hold itself
        wrapper = next((key for key in WRAPPERS if isinstance(state.get(key), dict)), None)
        if wrapper is None:
            break
        notes.append(f"took {wrapper!r}" + (" (averaged weights)" if "ema" in wrapper else ""))
        state = state[wrapper]
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        stored = value.untyped_storage().nbytes() if value.layout == torch.strided else math.inf
        if value.device.type == "cpu" and stored < value.numel() * value.element_size():
            raise UserError(f"{path} is refused: {name:.80} is larger than its memory in the file")
    stem = next(filter(STEM.search, tensors), None)
    if stem is None:
        raise UserError(f"{path} is not a MobileNetV2 of torchvision's form: {_describe(content, tensors)}")
    prefix = stem[: stem.index("features.0.0.weight")]
    if prefix:
        notes.append(f"removed the prefix {prefix!r}")
    named = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    pruned = [name.removesuffix("_orig") for name in named if f"{name.removesuffix('_orig')}_mask" in named]
    for name in pruned:
        if f"{name}_orig" in named:
            named[name] = named.pop(f"{name}_orig") * named.pop(f"{name}_mask")
    if pruned:
        notes.append("multiplied weights by their masks")
    ignored = [name for name in named if name.split(".")[-1] in LEFTOVERS] + [
        name for name in tensors if not name.startswith(prefix)
    ]
    ignored += [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if ignored:
        notes.append(f"ignored {', '.join(ignored[:3])}{', …' if len(ignored) > 3 else ''}")
    named = {name: value for name, value in named.items() if name.split(".")[-1] not in LEFTOVERS}
    others = {value.dtype for value in named.values() if value.is_floating_point()} - {torch.float32}
    if others:
        notes.append(f"converted {', '.join(sorted(map(str, others)))} to float32")
    for name in [name for name in named if name.endswith(".running_var")]:
        # Batch norms of old versions of torch do not count their batches.
        named.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    floats = {name: value.float() for name, value in named.items() if value.is_floating_point()}
    return named | floats, notes


def _describe(content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    names = list(tensors) or list(content)
    if any("_packed_params" in name for name in map(str, content)):
        return "it is a quantized model of torchvision, give the float weights that it was made from"
    if "conv_stem.weight" in tensors or "bn1.num_batches_tracked" in tensors:
        return "it is a model of timm or another architecture, whose layers have other names"
    return (
        f"it holds {', '.join(map(str, names[:4]))}{', …' if len(names) > 4 else ''}"
        if names
        else "it is empty"
    )


def architecture_of(path: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the architecture of a bare state_dict, derived from its shapes.

    Raises:
        UserError: the state_dict is not that of a MobileNetV2.
    """
    head, stem = state.get("classifier.1.weight"), state.get("features.0.0.weight")
    if not (isinstance(head, Tensor) and isinstance(stem, Tensor) and head.ndim == 2 and stem.ndim == 4):
        raise UserError(f"{path} is not a MobileNetV2: it lacks classifier.1.weight or features.0.0.weight")
    if not 1 <= head.shape[0] <= MOST_CLASSES:
        raise UserError(f"{path} is not a MobileNetV2: it has {head.shape[0]} classes")
    # Channels are rounded to multiples of 8, so several widths give the same shapes: the usual ones first.
    for width_mult in (*COMMON_WIDTHS, *(w / 20 for w in range(1, 201)), *(w / 100 for w in range(1, 1001))):
        if round_channels(STEM_CHANNELS * width_mult) != stem.shape[0]:
            continue
        with torch.device("meta"):
            model = MobileNetV2(num_classes=head.shape[0], width_mult=width_mult)
        if all(
            name in state and state[name].shape == value.shape for name, value in model.state_dict().items()
        ):
            return model.architecture
    raise UserError(f"{path} is not a MobileNetV2: its tensors have other shapes")
