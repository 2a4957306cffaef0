"""TorchScript files: models that run without this repository's code, on their quantization engine.

The one module that calls torch.jit, which torch has deprecated and still ships.
"""

import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoints.weights import is_torchscript
from utils.common.errors import UserError, one_line
from utils.common.files import atomic_write, check_input
from utils.common.runtime import plain, versions
from utils.data.datasets import Normalization

FORMAT = "mobilenetv2-torchscript"
FORMAT_VERSION = 1
METADATA_FILE = "metadata.json"
VARIANTS = ("float", "ptq_per_tensor", "ptq_per_channel", "qat")


@dataclass(frozen=True)
class ScriptMetadata:
    """What a TorchScript file says about its model.

    Args:
        variant: one of VARIANTS.
        engine: quantization engine that an int8 model was made for; None for float.
        architecture: the arguments of MobileNetV2.
        class_names: in label order.
        normalization: of the images that the model takes.
        image_size: side in pixels of the images that it was made for.
        parameters: weights and biases.
        nonzeros: those of them that are not zero.
        macs: multiply-adds of an image.
        dense_size_mb: MB of the parameters at their precision.
        nonzero_size_mb: MB of the nonzero ones, without any index.
        metrics: measured numbers, by name.
        versions: of what wrote the file.
    """

    variant: str
    engine: str | None
    architecture: dict[str, Any]
    class_names: tuple[str, ...]
    normalization: Normalization
    image_size: int
    parameters: int
    nonzeros: int
    macs: int
    dense_size_mb: float
    nonzero_size_mb: float
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def density(self) -> float:
        """Fraction of the parameters that are not zero."""
        return self.nonzeros / self.parameters

    def to_json(self) -> str:
        """As it stands in the file."""
        return json.dumps(plain({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}))

    @classmethod
    def from_json(cls, text: str) -> "ScriptMetadata":
        """The reverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: the text is something else.
        """
        content = json.loads(text)
        if (content["format"], content["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"it has format {content['format']} {content['format_version']}")
        content = {f.name: content[f.name] for f in fields(cls)}
        if content["variant"] not in VARIANTS:
            raise ValueError(f"it has the unknown variant {content['variant']!r}")
        normalization = content["normalization"]
        content["normalization"] = Normalization(
            *(tuple(map(float, normalization[k])) for k in ("mean", "std"))
        )
        content["class_names"] = tuple(map(str, content["class_names"]))
        for name in ("image_size", "parameters", "nonzeros", "macs"):
            content[name] = int(content[name])
        for name in ("dense_size_mb", "nonzero_size_mb"):
            content[name] = float(content[name])
        return cls(**content)


def to_torchscript(model: nn.Module, image_size: int) -> torch.jit.ScriptModule:
    """A frozen TorchScript form of a float or int8 model, with the same outputs at any batch size.

    It has not run yet (see `fresh_copy`), since freezing packs its int8 weights anew.

    Args:
        model: maps images (N, 3, image_size, image_size) to logits; its batch norms are best folded.
        image_size: side in pixels; another one works as well.
    """
    example = torch.zeros(1, 3, image_size, image_size)
    with _quietly(), torch.no_grad():
        # Traced, not scripted: torch's int8 layers check the rank of their input with branches that
        # stay in a scripted graph and take a tenth of the time of a small batch. The model has no
        # control flow that could depend on its input.
        return torch.jit.freeze(
            torch.jit.trace(model.eval(), example, check_trace=False).eval(), ["training"]
        )


def fresh_copy(scripted: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A copy that has not run yet, with its int8 weights packed for the current engine.

    With the engines x86 and onednn, each convolution keeps the kernel that was made for the first
    batch it sees. For a batch of another shape they are set up in every call, which takes 1.1 to 3
    times as long, and up to 18 times after images of another size.
    """
    written = io.BytesIO()
    with _quietly():
        torch.jit.save(scripted, written)
        return torch.jit.load(io.BytesIO(written.getvalue()), map_location="cpu")


def pack_torchscript(scripted: torch.jit.ScriptModule, metadata: ScriptMetadata) -> bytes:
    """The content of a file; equal models give equal bytes."""
    written, packed = io.BytesIO(), io.BytesIO()
    with _quietly():
        torch.jit.save(scripted, written, _extra_files={METADATA_FILE: metadata.to_json()})
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(packed, "w") as target:
        for name in source.namelist():
            # Left out: where each operation stood in the sources, with the paths of this machine.
            if not name.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(name), source.read(name))
    return packed.getvalue()


def save_torchscript(
    path: str | os.PathLike, scripted: torch.jit.ScriptModule, metadata: ScriptMetadata
) -> None:
    """Write a model and what it is.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file stays whole.
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(pack_torchscript(scripted, metadata))


def load_torchscript(path: str | os.PathLike) -> tuple[torch.jit.ScriptModule, ScriptMetadata]:
    """Open a file of `save_torchscript`.

    The model runs on `metadata.engine`, which is made the current one by the caller
    (utils.quantization.eager.use_engine) and only for the time of the call here.

    Raises:
        UserError: the file is missing, truncated, damaged, not TorchScript or not of this project,
            or its engine does not run on this machine.
    """
    path = check_input(path, "TorchScript file")
    if not is_torchscript(path):
        raise UserError(f"{path} is truncated or not a TorchScript file: write or fetch it again")
    metadata = _read_metadata(path)
    with engine_of(path, metadata):
        try:
            return torch.jit.load(path, map_location="cpu"), metadata
        except Exception as error:
            # torch raises whatever the broken part raises.
            raise UserError(
                f"{path} is damaged ({one_line(error)[:120]}): write or fetch it again"
            ) from error


@contextmanager
def engine_of(path: str | os.PathLike, metadata: ScriptMetadata) -> Iterator[None]:
    """Make a file's engine the current one, and torch quiet: int8 weights are packed as they are read.

    Raises:
        UserError: it does not run on this machine.
    """
    supported = torch.backends.quantized.supported_engines
    if metadata.engine is not None and metadata.engine not in supported:
        raise UserError(
            f"{path} was made for the quantization engine {metadata.engine}, which this machine does "
            f"not run (it runs {', '.join(e for e in supported if e != 'none')}): make it anew with --backend"
        )
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = metadata.engine or before
    try:
        with _quietly():
            yield
    finally:
        torch.backends.quantized.engine = before


def float_forms(model: nn.Module, image_size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """The ways to run a float model in TorchScript, by what to call them; which is faster depends.

    Args:
        model: in eval mode; batch norms are folded here. A ScriptModule works as well.
        image_size: side in pixels.
    """
    with _quietly():
        scripted = isinstance(model, torch.jit.ScriptModule)
        frozen = model if scripted else to_torchscript(model, image_size)
        return {
            "frozen TorchScript": frozen,
            "TorchScript optimized for inference (oneDNN)": torch.jit.optimize_for_inference(frozen),
        }


@dataclass(frozen=True)
class GraphTensor:
    """A tensor that a graph computes, by its name in the graph."""

    name: str


def graph_operations(scripted: torch.jit.ScriptModule) -> Iterator[tuple[str, list[Any], GraphTensor]]:
    """The operations of a frozen model, in the order of running: what it is, its arguments, its result.

    An argument is a GraphTensor, or the constant that is frozen into the graph: a number, a list, a
    tensor, packed int8 weights. The first operation that has a GraphTensor takes the images.
    """
    for node in scripted.inlined_graph.nodes():
        if node.kind() not in ("prim::Constant", "prim::ListConstruct"):
            yield node.kind(), [_argument(value) for value in node.inputs()], _result(node.output())


def _argument(value: Any) -> Any:
    node = value.node()
    if node.kind() == "prim::ListConstruct":
        return [_argument(item) for item in node.inputs()]
    return value.toIValue() if node.kind() == "prim::Constant" else _result(value)


def _result(value: Any) -> GraphTensor:
    return GraphTensor(value.debugName())


def _read_metadata(path: Path) -> ScriptMetadata:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise UserError(
                    f"{path} is damaged (the checksum of {damaged} is wrong): write or fetch it again"
                )
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA_FILE}")]
            if len(names) != 1:
                raise UserError(
                    f"{path} is a TorchScript file of another project: only files of "
                    "post_training_quantization.py and quantization_aware_training.py are opened"
                )
            return ScriptMetadata.from_json(archive.read(names[0]).decode())
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} has metadata that cannot be read ({one_line(error)[:120]}): write or fetch it again"
        ) from error


@contextmanager
def _quietly():
    """Torch announces in several warnings that TorchScript and quantized tensors are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # One of them comes from C++, once in a process, and from jit.load straight to stderr. Brought
        # about here, it goes through Python and is ignored with the others.
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8)
        yield
