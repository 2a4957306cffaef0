"""Packed files of float weights, dense or pruned: the whole state_dict as float32 or float16.

The stream `values` holds the weights in forward order, `biases` the classifier's, and `batch_norm` the
scales of all batch norms, then their shifts, running means and running variances.

float32 comes back bit for bit. float16 rounds every value, including those of batch norms, to the nearest
float16, which is read as float32. The relative error is at most 2**-11; values below 6e-5 have an absolute
error of at most 3e-8, which is negligible next to the 1e-5 that a batch norm adds to its variance.
"""

import os
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from utils.checkpoints.weights import FORMAT, FORMAT_VERSION, Weights
from utils.common.errors import UserError
from utils.common.runtime import plain, versions
from utils.packing.container import reading
from utils.packing.format import PackedFile, Slot, encode
from utils.quantization.int8_model import layer_shapes

TYPES = ("float32", "float16")
STREAM_TYPES = dict.fromkeys(("values", "biases", "batch_norm"), TYPES)
COUNTER = "num_batches_tracked"


def float_slots(architecture: dict[str, Any]) -> list[Slot]:
    """List the slots of a MobileNetV2, except for the counters of its batch norms.

    Batch-norm vectors are grouped by kind, since similar numbers compress better together.
    """
    shapes = layer_shapes(architecture)
    *convolutions, classifier = shapes
    return [
        *(Slot(f"{name}.weight", name, "values", shape) for name, shape in shapes.items()),
        *(
            Slot(f"{_norm_after(name)}.{kind}", name, "batch_norm", shapes[name][:1])
            for kind in ("weight", "bias", "running_mean", "running_var")
            for name in convolutions
        ),
        Slot(f"{classifier}.bias", classifier, "biases", shapes[classifier][:1]),
    ]


def _norm_after(convolution: str) -> str:
    """Return the name of the batch norm after a convolution."""
    sequence, _, index = convolution.rpartition(".")
    return f"{sequence}.{int(index) + 1}"


def round_to(state: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Return the state_dict that a packed file of this type gives back.

    Raises:
        UserError: a value is too large for the type.
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
    """Return the content of a packed file of `weights`; `dtype` is one of TYPES.

    Raises:
        UserError: a value is NaN, infinite, or too large for the type.
    """
    state = round_to(weights.model.state_dict(), dtype)
    slots = float_slots(weights.model.architecture)
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


def read_tensors(file: PackedFile) -> tuple[list[Slot], dict[str, np.ndarray]]:
    """Return the slots of a packed file of float weights, and its tensors by name.

    Raises:
        ValueError, KeyError, ...: the file is damaged.
    """
    slots = float_slots(file.header["architecture"])
    return slots, file.read(slots, STREAM_TYPES)


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Read a packed file of float weights into the content of a weights file.

    Raises:
        UserError: the file is damaged, foreign, of another version, or holds an int8 model.
    """
    with reading(path):
        file = PackedFile(path)
        header = file.header
        if header["dtype"] == "int8":
            raise UserError(f"{path} is a packed int8 model: weights (.pth, or packed float) are wanted here")
        if header["dtype"] not in TYPES:
            raise ValueError("its type is unknown")
        _, arrays = read_tensors(file)
        state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
        norms = [name.removesuffix("running_var") for name in state if name.endswith("running_var")]
        counts = torch.tensor(header[COUNTER], dtype=torch.int64)
        state |= {f"{norm}{COUNTER}": count for norm, count in zip(norms, counts, strict=True)}
    return header | {"format": FORMAT, "format_version": FORMAT_VERSION, "state_dict": state}
