"""Packed model files: as small as what is in them, and opened again exactly.

`load_weights` and `open_model` read them like any other file. Their format is described in
utils/packing/format.py.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from utils.checkpoints.weights import MOBILENETV2_KINDS, Weights, is_torchscript, load_weights
from utils.common.errors import UserError
from utils.common.files import check_input
from utils.deployment.torchscript import ScriptMetadata, engine_of, load_torchscript
from utils.packing import float_weights as packing_float
from utils.packing import int8_weights as packing_int8
from utils.packing.codecs import GAPS, MASK, huffman_size, is_kept, planes_size, to_gaps
from utils.packing.format import PackedFile, is_packed
from utils.packing.int8_weights import encode_int8, int8_tensors, is_packed_int8, load_int8

DTYPES = ("float32", "float16", "int8")
KINDS = ("values", "positions", "scales", "biases", "batch_norm", "header")
KIND_OF_STREAM = {"mask": "positions", "gaps": "positions", "ranges": "scales"}
"""Of the others, the kind is the name."""
CHECK_IMAGES = 8

Int8Model = tuple[torch.jit.ScriptModule, ScriptMetadata]


def open_source(path: str | os.PathLike, dtype: str | None) -> tuple[Weights | Int8Model, str]:
    """A model of any kind, and the type to pack it in.

    Args:
        path: weights (.pth), an int8 TorchScript file, or a packed file.
        dtype: one of DTYPES; None for the file's own.

    Raises:
        UserError: the file is missing, broken or foreign, or cannot be packed in this type.
    """
    path = check_input(path, "model file")
    if is_torchscript(path) or is_packed_int8(path):
        scripted, metadata = load_torchscript(path) if is_torchscript(path) else load_int8(path)
        if metadata.engine is None:
            raise UserError(
                f"{path} is a float TorchScript file, whose batch norms are gone: pack the weights (.pth) "
                "that it was made from"
            )
        if dtype not in (None, "int8"):
            raise UserError(
                f"{path} is int8, which --dtype {dtype} cannot undo: leave --dtype out, or pack the weights "
                "(.pth) that it was made from"
            )
        return (scripted, metadata), "int8"
    weights = load_weights(path, MOBILENETV2_KINDS)
    if dtype == "int8":
        raise UserError(
            f"{path} holds float weights: quantize them with post_training_quantization.py or "
            "quantization_aware_training.py, then pack the .pt file that it writes"
        )
    return weights, dtype or (PackedFile(path).header["dtype"] if is_packed(path) else "float32")


def encode(source: Weights | Int8Model, dtype: str) -> bytes:
    """The content of a packed file of what `open_source` gives.

    Raises:
        UserError: the model holds NaN or infinity, a value that is too large for float16, or is
            no int8 MobileNetV2.
    """
    if isinstance(source, Weights):
        return packing_float.encode_weights(source, dtype)
    try:
        return encode_int8(*source)
    except ValueError as error:
        raise UserError(f"the model is not one of this project ({error}): quantize it anew") from error


def check_same(path: str | os.PathLike, source: Weights | Int8Model, dtype: str) -> str:
    """Open a packed file and compare it with what it was made from, bit for bit.

    Returns:
        What was found equal, in words.

    Raises:
        RuntimeError: something differs.
        UserError: the file cannot be opened.
    """
    if isinstance(source, Weights):
        expected = packing_float.round_to(source.model.state_dict(), dtype)
        found = load_weights(path, MOBILENETV2_KINDS).model.state_dict()
        differing = [name for name in expected if not _same_bits(expected[name], found[name])]
        if differing or list(expected) != list(found):
            raise RuntimeError(f"{path}: {', '.join(differing) or 'the list of tensors'} did not come back")
        return f"{len(expected)} tensors came back bit for bit{' as float16' * (dtype == 'float16')}"
    (scripted, metadata), (unpacked, _) = source, load_int8(path)
    model = packing_int8.empty_model(metadata.architecture)
    before, after = int8_tensors(scripted, model), int8_tensors(unpacked, model)
    if before.ranges != after.ranges or not all(
        _same_bits(before.weights[name].int_repr(), after.weights[name].int_repr())
        and _same_bits(before.scales(name), after.scales(name))
        and torch.equal(before.biases[name], after.biases[name])
        for name in before.weights
    ):
        raise RuntimeError(f"{path}: int8 weights, scales, biases or ranges did not come back")
    side = metadata.image_size
    images = torch.randn(CHECK_IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
    with engine_of(path, metadata), torch.inference_mode():
        if not torch.equal(scripted(images), unpacked(images)):
            raise RuntimeError(f"{path}: the logits are not those of the model that was packed")
    return f"int8 tensors came back bit for bit, logits of {CHECK_IMAGES} random images are equal"


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    first, second = first.numpy(), second.numpy()
    return (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes())


def packed_sizes(path: str | os.PathLike) -> pd.DataFrame:
    """Where the bytes of a packed file go.

    Returns:
        A row for each layer and kind, columns `layer` (name of a convolution or linear layer in
        forward order; empty for what belongs to none, such as the header), `kind` (one of KINDS) and
        `bytes` (int). The sum of `bytes` is the size of the file. Layers share compressed streams; a
        layer's part of a stream is in proportion to what its own bytes would take if they were Huffman
        coded alone.

    Raises:
        UserError: the file is missing, no packed file, or damaged.
    """
    path = check_input(path, "packed file")
    if not is_packed(path):
        raise UserError(f"{path} is not a packed file: give one of scripts/pack_weights.py")
    file = PackedFile(path)
    module = packing_int8 if file.header.get("dtype") == "int8" else packing_float
    slots = module.read_slots(file)
    tensors = file.read(slots, module.STREAM_TYPES)
    encodings = dict(
        zip((s.name for s in slots if s.stream == "values"), file.header["encodings"], strict=True)
    )

    # Bytes that a tensor would take alone, by stream.
    alone: dict[str, list[tuple[str, int]]] = {}
    for slot in slots:
        values = tensors[slot.name].reshape(-1)
        if encodings.get(slot.name) in (MASK, GAPS):
            kept = is_kept(values)
            values = values[kept]
            stream, places = (
                ("mask", np.packbits(kept)) if encodings[slot.name] == MASK else ("gaps", to_gaps(kept))
            )
            alone.setdefault(stream, []).append((slot.layer, huffman_size(places)))
        alone.setdefault(slot.stream, []).append((slot.layer, planes_size(values)))
    rows = []
    for stream, parts in alone.items():
        kind = KIND_OF_STREAM.get(stream, stream)
        layers, weights = zip(*parts, strict=True)
        ends = np.cumsum(weights, dtype=np.float64)
        ends = np.rint(ends * (file.archive.size(stream) / max(ends[-1], 1))).astype(int)
        rows += zip(layers, [kind] * len(layers), np.diff(ends, prepend=0), strict=True)
    sizes = pd.DataFrame(rows, columns=["layer", "kind", "bytes"])
    sizes = sizes.groupby(["layer", "kind"], sort=False, as_index=False)["bytes"].sum()
    rest = Path(path).stat().st_size - int(sizes["bytes"].sum())
    sizes.loc[len(sizes)] = ["", "header", rest]
    order = {
        layer: place
        for place, layer in enumerate([*dict.fromkeys(slot.layer for slot in slots if slot.layer), ""])
    }
    by_layer = sizes.sort_values("layer", key=lambda column: column.map(order), kind="stable")
    return by_layer.reset_index(drop=True)
