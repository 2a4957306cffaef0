"""Float weights, dense or pruned, as packed files: the whole state_dict, float32 or float16.

The stream `values` holds the weights in forward order, `biases` the classifier's, and `batch_norm` the
scales of all batch norms, then their shifts, running means and running variances.

float32 comes back bit for bit. float16 rounds every value to the nearest float16 and reads it back as
float32, batch norms included. The relative error is at most 2**-11; values below 6e-5 have an absolute
error of 3e-8, which is negligible next to the 1e-5 that is added to a running variance.
"""

import os
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from models import MobileNetV2
from utils.checkpoints.weights import FORMAT, FORMAT_VERSION, Weights
from utils.common.errors import UserError
from utils.common.runtime import plain, versions
from utils.packing.format import ARCHITECTURE_ERRORS, PackedFile, Slot, encode

TYPES = ("float32", "float16")
STREAM_TYPES = dict.fromkeys(("values", "biases", "batch_norm"), TYPES)
COUNTER = "num_batches_tracked"


def float_slots(model: nn.Module) -> list[Slot]:
    """List the slots of a MobileNetV2, except for the counters of its batch norms.

    Batch-norm vectors are grouped by kind, since similar numbers compress better together.
    """
    layer, slots = "", []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            layer = name
        for key, value in module.state_dict(prefix=f"{name}.").items() if not list(module.children()) else ():
            parameter = key.rpartition(".")[2]
            if isinstance(module, nn.BatchNorm2d):
                stream = "batch_norm"
            else:
                stream = "values" if parameter == "weight" else "biases"
            if parameter != COUNTER:
                slots.append(Slot(key, layer, stream, tuple(value.shape)))
    order = {"weight": 0, "bias": 1, "running_mean": 2, "running_var": 3}
    return sorted(slots, key=lambda slot: order[slot.name.rpartition(".")[2]])


def round_to(state: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Return the state_dict that comes back from a packed file of this type.

    Raises:
        UserError: a value is too large for it.
    """
    if dtype == "float32":
        return state
    rounded = {}
    for name, value in state.items():
        # -0.0, from small negative numbers or a mask, becomes 0.0.
        rounded[name] = value.half().float() + 0.0 if value.is_floating_point() else value
        if not rounded[name].isfinite().all():
            raise UserError(
                f"{name} has values beyond 65504, the largest of float16: pack it with --dtype float32"
            )
    return rounded


def encode_weights(weights: Weights, dtype: str) -> bytes:
    """Return the content of a packed file of `weights`; dtype is one of TYPES.

    Raises:
        UserError: a value is NaN, infinite, or too large for the type.
    """
    state = round_to(weights.model.state_dict(), dtype)
    slots = float_slots(weights.model)
    header = {
        "dtype": dtype,
        "kind": weights.kind,
        "architecture": weights.model.architecture,
        "class_names": weights.class_names,
        "normalization": asdict(weights.normalization) if weights.normalization else None,
        "image_size": weights.image_size,
        "metrics": weights.metrics,
        "versions": versions(),
        COUNTER: [int(value) for name, value in state.items() if name.endswith(COUNTER)],
    }
    tensors = {slot.name: state[slot.name].numpy().astype(dtype) for slot in slots}
    return encode(plain(header), slots, tensors)


def read_slots(file: PackedFile) -> list[Slot]:
    """List the slots of a packed file of float weights.

    Raises:
        UserError: its architecture is invalid, or it holds an int8 model.
    """
    if file.header.get("dtype") not in TYPES:
        raise UserError(
            f"{file.path} is a packed int8 model: weights (.pth, or packed float) are wanted here"
        )
    try:
        return _layout(tuple(file.header["architecture"].items()))[0]
    except ARCHITECTURE_ERRORS as error:
        raise file.wrong(error) from error


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Read a packed file of float weights into the content of a weights file.

    Raises:
        UserError: the file is damaged, foreign, of another version, or holds an int8 model.
    """
    file = PackedFile(path)
    arrays = file.read(read_slots(file), STREAM_TYPES)
    tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    _, names = _layout(tuple(file.header["architecture"].items()))
    try:
        counts = torch.tensor(file.header[COUNTER], dtype=torch.int64)
        counters = [name for name in names if name.endswith(COUNTER)]
        tensors.update(zip(counters, counts, strict=True))
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise file.wrong(error) from error
    state = {name: tensors[name] for name in names}
    return file.header | {"format": FORMAT, "format_version": FORMAT_VERSION, "state_dict": state}


@lru_cache(maxsize=8)
def _layout(architecture: tuple[tuple[str, Any], ...]) -> tuple[list[Slot], list[str]]:
    """Return the slots, and the names in the state_dict."""
    # The meta device allocates nothing, whatever the header asks for.
    with torch.device("meta"):
        model = MobileNetV2(**dict(architecture))
    return float_slots(model), list(model.state_dict())
