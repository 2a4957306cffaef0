"""Reads TorchScript files of this project as data, without running any of their code.

`torch.jit.load` would run it. Here, an unpickler that knows only tensors reads the weights, and regular
expressions read the qparams from the text of the graph; utils/open_model.py rebuilds the model from them.
"""

import io
import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models import MobileNetV2
from models.folding import fold_batch_norms
from utils.checkpoints.metadata import Metadata
from utils.checkpoints.pickles import check_pickle
from utils.checkpoints.weights import is_torchscript
from utils.common.errors import UserError, one_line
from utils.common.files import check_input
from utils.deployment.torchscript import METADATA_FILE
from utils.quantization.int8_model import Int8Model, QParams, activation_names, layer_shapes

LARGEST_TEXT = 2**20
"""Bytes of any part but the tensors: metadata, code, pickle."""
LARGEST_NUMBER_OF_MEMBERS = 4096
LONGEST_LINE = 200
"""Characters of a line of code: the expressions below take the square of them."""
STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "ShortStorage": np.int16,
    "QInt8Storage": np.int8,
}
INT8_OPERATION = re.compile(
    r"(?:torch\.quantize_per_tensor\(x|ops\.quantized\.\w+\(.*?(?:CONSTANTS\.c(\d+)|\w+))"
    r", ([\d.e+-]+), (\d+)[,)]"
)
FLOAT_OPERATION = re.compile(r"torch\.(?:_convolution|linear)\(\w+, CONSTANTS\.c(\d+), CONSTANTS\.c(\d+)")
"""The operations of a frozen graph, as torch prints them."""
KNOWN_CALLS = re.compile(
    r"_convolution|hardtanh_?|add_?|linear|adaptive_avg_pool2d|flatten|dequantize|quantize_per_tensor"
    r"|quantized\.(?:conv2d|add|linear)"
)
"""What the code may call: a file that calls anything else does not compute what its tensors suggest."""


def read_torchscript(path: str | os.PathLike) -> tuple[Int8Model | MobileNetV2, Metadata]:
    """Read a file of `save_torchscript`.

    Returns:
        The tensors of an int8 model, or a float model with its batch norms folded; and the metadata.

    Raises:
        UserError: the file is missing, truncated, damaged, not TorchScript or not of this project.
    """
    path = check_input(path, "TorchScript file")
    if not is_torchscript(path):
        raise UserError(f"{path} is truncated or not a TorchScript file: write or fetch it again")
    try:
        with zipfile.ZipFile(path) as archive:
            metadata = _read_metadata(path, archive)
            code = _read_code(archive)
            constants = _read_constants(archive)
        model = _float_model if metadata.engine is None else _int8_model
        return model(metadata, code, constants), metadata
    except UserError:
        raise
    except Exception as error:
        # Depending on what is damaged, almost anything can be raised.
        raise UserError(
            f"{path} is damaged or not of this project ({one_line(error)[:120]}): write or fetch it again"
        ) from error


def _read_metadata(path: Path, archive: zipfile.ZipFile) -> Metadata:
    names = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA_FILE}")]
    if len(names) != 1:
        raise UserError(
            f"{path} is a TorchScript file of another project: only files of "
            "post_training_quantization.py and quantization_aware_training.py are opened"
        )
    if len(archive.infolist()) > LARGEST_NUMBER_OF_MEMBERS:
        raise ValueError(f"it has {len(archive.infolist())} parts")
    for member in archive.infolist():
        # A compressed one could be far larger than the file.
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"{member.filename} is compressed")
        if "/constants/" not in member.filename and member.file_size > LARGEST_TEXT:
            raise ValueError(f"{member.filename} is larger than {LARGEST_TEXT} bytes")
    damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
    return Metadata.from_dict(json.loads(archive.read(names[0])))


def _read_code(archive: zipfile.ZipFile) -> str:
    (name,) = [name for name in archive.namelist() if re.search(r"/code/__torch__/models/.*\.py$", name)]
    code = archive.read(name).decode()
    if any(len(line) > LONGEST_LINE for line in code.split("\n")):
        raise ValueError("its code has a line that is too long")
    for call in re.findall(r"\b(?:torch|ops)\.([\w.]+)\(", code):
        if not KNOWN_CALLS.fullmatch(call):
            raise ValueError(f"it calls {call}")
    return code


def _int8_model(metadata: Metadata, code: str, constants: list[Any]) -> Int8Model:
    names = activation_names(metadata.architecture)
    shapes = layer_shapes(metadata.architecture)
    found = INT8_OPERATION.findall(code)
    weights, scales, biases, activations = {}, {}, {}, {}
    for name, (index, scale, zero_point) in zip(names, found, strict=True):
        activations[name] = QParams(float(scale), int(zero_point))
        if name not in shapes:
            continue
        weight, biases[name] = constants[int(index)].weight, constants[int(index)].bias
        weights[name], scales[name] = weight.values, weight.scales
        expected = shapes[name], shapes[name][:1], torch.int8
        found_as = weight.values.shape, biases[name].shape, weight.values.dtype
        if found_as != expected or weight.scales.shape not in ((1,), shapes[name][:1]):
            raise ValueError(f"{name} has another shape or type")
    return Int8Model(metadata.architecture, weights, scales, biases, activations)


def _float_model(metadata: Metadata, code: str, constants: list[Any]) -> MobileNetV2:
    with torch.device("meta"):
        model = fold_batch_norms(MobileNetV2(**metadata.architecture))
    state: dict[str, Tensor] = {}
    layers = layer_shapes(metadata.architecture)
    for name, (weight, bias) in zip(layers, FLOAT_OPERATION.findall(code), strict=True):
        state |= {f"{name}.weight": constants[int(weight)], f"{name}.bias": constants[int(bias)]}
    if any(tensor.dtype != torch.float32 for tensor in state.values()):
        raise ValueError("a weight is not float32")
    # Cloned, since the file stores equal tensors once.
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return model.eval()


class _Quantized(NamedTuple):
    """A quantized weight: int8 values and float32 scales."""

    values: Tensor
    scales: Tensor


class _PackedParameters:
    """The weight and bias of a convolution or linear layer, which torch packs into one object."""

    def __setstate__(self, state: tuple) -> None:
        flat = [one for part in state for one in (part if isinstance(part, list) else [part])]
        (self.weight,) = [one for one in flat if isinstance(one, _Quantized)]
        (self.bias,) = [one for one in flat if isinstance(one, Tensor) and one.dtype == torch.float32]


class _Unpickler(pickle.Unpickler):
    """Builds tensors, lists and `_PackedParameters`; refuses everything else.

    Each storage is read for only one tensor, so the tensors are no larger than the file.
    """

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.unread = {name for name in archive.namelist() if name.startswith(f"{folder}/constants/")}
        self.known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): self.rebuild_tensor,
            ("torch._utils", "_rebuild_qtensor"): self.rebuild_quantized,
            ("torch.jit._pickle", "build_tensorlist"): lambda tensors: tensors,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _tag: value,
            ("collections", "OrderedDict"): lambda: None,
            ("torch", "per_channel_affine"): "per_channel_affine",
            ("torch", "per_tensor_affine"): "per_tensor_affine",
            ("__torch__.torch.classes.quantized", "Conv2dPackedParamsBase"): _PackedParameters,
            ("__torch__.torch.classes.quantized", "LinearPackedParamsBase"): _PackedParameters,
            **{("torch", name): dtype for name, dtype in STORAGES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise ValueError(f"it holds {module}.{name}")
        return self.known[module, name]

    def persistent_load(self, pid: Any) -> tuple[type, str]:
        """Return the type and name of a storage; `rebuild_tensor` reads it."""
        _, dtype, key, _, _ = pid
        return dtype, f"{self.folder}/constants/{key}"

    def rebuild_tensor(
        self, storage: tuple[type, str], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        """Return a contiguous tensor that uses each value of its storage exactly once."""
        dtype, name = storage
        self.unread.remove(name)
        values: np.ndarray = np.frombuffer(bytearray(self.archive.read(name)), dtype)
        expected = 1
        for step, n in sorted(zip(stride, size, strict=True)):
            if n != 1 and step != expected:
                raise ValueError(f"a tensor has strides {stride} for the shape {size}")
            expected *= n
        if offset != 0 or expected != len(values):
            raise ValueError(f"a tensor of shape {size} does not fill its storage")
        return torch.from_numpy(values).as_strided(size, stride).contiguous()

    def rebuild_quantized(self, *args: Any) -> _Quantized:
        values = self.rebuild_tensor(*args[:4])
        kind, scale, zero_point = args[4][:3]
        if kind == "per_tensor_affine":
            scale, zero_point = torch.tensor([scale], dtype=torch.float64), torch.tensor([zero_point])
        if zero_point.any():
            raise ValueError("a weight is not symmetric")
        if not (torch.equal(scale.float().double(), scale) and scale.isfinite().all() and (scale > 0).all()):
            raise ValueError("a scale is not a positive float32")
        return _Quantized(values, scale.float())


def _read_constants(archive: zipfile.ZipFile) -> list[Any]:
    (name,) = [name for name in archive.namelist() if name.endswith("/constants.pkl")]
    content = archive.read(name)
    check_pickle(io.BytesIO(content))
    return list(_Unpickler(io.BytesIO(content), archive, name.rpartition("/")[0]).load())
