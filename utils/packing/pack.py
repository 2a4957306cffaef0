"""Pack models into small files, check that they come back, and report where the bytes go.

utils/packing/format.py describes the format.
"""

import os
from typing import TYPE_CHECKING

import numpy as np
import torch

from utils.checkpoints.metadata import Metadata
from utils.checkpoints.weights import Weights
from utils.common.errors import UserError
from utils.common.files import check_input
from utils.common.tables import format_table
from utils.packing import float_weights, int8_weights
from utils.packing.codecs import DENSE, MASK, huffman_size, is_kept, planes_size, to_gaps
from utils.packing.container import reading
from utils.packing.format import PackedFile, is_packed
from utils.quantization.int8_model import Int8Model

if TYPE_CHECKING:
    import pandas as pd

DTYPES = ("float32", "float16", "int8")
KINDS = ("values", "positions", "scales", "biases", "batch_norm", "header")
KIND_OF_STREAM = {"mask": "positions", "gaps": "positions", "ranges": "scales"}
"""Every other stream has the name of its kind."""

Source = Weights | tuple[Int8Model, Metadata]


def encode(source: Source, dtype: str) -> bytes:
    """Return the content of a packed file.

    Args:
        source: what to pack.
        dtype: one of DTYPES; "int8" for an int8 model.

    Raises:
        UserError: the model holds NaN or infinity, or a value that is too large for float16.
    """
    if isinstance(source, Weights):
        return float_weights.encode_weights(source, dtype)
    return int8_weights.encode_int8(*source)


def check_same(path: str | os.PathLike, source: Source, dtype: str) -> str:
    """Read a packed file and compare it bit for bit with what it was made from.

    Returns:
        What was compared, for the user.

    Raises:
        RuntimeError: a tensor differs.
        UserError: the file cannot be opened.
    """
    if isinstance(source, Weights):
        expected = float_weights.round_to(source.model.state_dict(), dtype)
        found = float_weights.read_weights(path)["state_dict"]
    else:
        expected, found = _tensors(source[0]), _tensors(int8_weights.read_int8(path)[0])
    if expected.keys() != found.keys():
        raise RuntimeError(f"{path}: the list of tensors did not come back")
    differing = [name for name in expected if _bits(expected[name]) != _bits(found[name])]
    if differing:
        raise RuntimeError(f"{path}: {', '.join(differing)} did not come back")
    return f"{len(expected)} tensors came back bit for bit{' as float16' * (dtype == 'float16')}"


def _tensors(model: Int8Model) -> dict[str, torch.Tensor]:
    # A bias of -0.0 comes back as 0.0.
    biases = {name: bias + 0.0 for name, bias in model.biases.items()}
    groups = {"weight": model.weights, "scale": model.scales, "bias": biases}
    tensors = {f"{name}.{kind}": one for kind, group in groups.items() for name, one in group.items()}
    return tensors | {
        name: torch.tensor([one.scale, one.zero_point]) for name, one in model.activations.items()
    }


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.numpy().tobytes()


def packed_sizes(path: str | os.PathLike) -> "pd.DataFrame":
    """Return where the bytes of a packed file go.

    Returns:
        One row per layer and kind, in forward order, with columns `layer` (empty for what belongs to no
        layer, such as the header), `kind` (one of KINDS) and `bytes` (int). The sum of `bytes` is the
        size of the file. Layers share compressed streams; each gets a share of a stream in proportion to
        the Huffman-coded size of its own bytes.

    Raises:
        UserError: the file is missing, not a packed file, or damaged.
    """
    import pandas as pd

    path = check_input(path, "packed file")
    if not is_packed(path):
        raise UserError(f"{path} is not a packed file: give one of scripts/pack_weights.py")
    with reading(path):
        file = PackedFile(path)
        module = int8_weights if file.header["dtype"] == "int8" else float_weights
        slots, tensors = module.read_tensors(file)
    encodings = iter(file.header["encodings"])

    # Layer and Huffman-coded size of each tensor, by stream.
    alone: dict[str, list[tuple[str, int]]] = {}
    for slot in slots:
        values = tensors[slot.name].reshape(-1)
        encoding = next(encodings) if slot.stream == "values" else DENSE
        if encoding != DENSE:
            kept = is_kept(values)
            values = values[kept]
            stream, places = ("mask", np.packbits(kept)) if encoding == MASK else ("gaps", to_gaps(kept))
            alone.setdefault(stream, []).append((slot.layer, huffman_size(places)))
        alone.setdefault(slot.stream, []).append((slot.layer, planes_size(values)))
    rows: list[tuple[str, str, int]] = []
    for stream, parts in alone.items():
        kind = KIND_OF_STREAM.get(stream, stream)
        ends = np.cumsum([size for _, size in parts], dtype=np.float64)
        ends = np.rint(ends * (file.archive.size(stream) / max(ends[-1], 1))).astype(int)
        shares = np.diff(ends, prepend=0).tolist()
        rows += [(layer, kind, share) for (layer, _), share in zip(parts, shares, strict=True)]
    rows.append(("", "header", path.stat().st_size - sum(size for _, _, size in rows)))
    order = [*dict.fromkeys(slot.layer for slot in slots if slot.layer), ""]
    rows.sort(key=lambda row: order.index(row[0]))
    sizes = pd.DataFrame(rows, columns=["layer", "kind", "bytes"])
    return sizes.groupby(["layer", "kind"], sort=False, as_index=False).sum()


def format_sizes(sizes: "pd.DataFrame") -> str:
    """Lay out where the bytes of a file go, by kind.

    Args:
        sizes: as `packed_sizes` returns them.
    """
    by_kind = sizes.groupby("kind")["bytes"].sum()
    total = int(by_kind.sum())
    rows = [
        (kind, int(by_kind[kind]), f"{100 * by_kind[kind] / total:.2f}") for kind in KINDS if kind in by_kind
    ]
    return format_table(["in the file", "bytes", "%"], [*rows, ("all", total, "100.00")])
