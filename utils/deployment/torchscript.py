"""Writes TorchScript files: models that run without the code of this repository.

Only this module calls torch.jit, which is deprecated but still part of torch. Reading a file needs no
torch.jit (utils/deployment/torchscript_reader.py).
"""

import io
import json
import os
import re
import zipfile
from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.checkpoints.metadata import Metadata
from utils.common.files import atomic_write
from utils.quantization.eager import quietly, to_module
from utils.quantization.int8_model import Int8Model

Scripted = torch.jit.ScriptModule

METADATA_FILE = "metadata.json"
TRACE_NUMBER = re.compile(r"(?<=___torch_mangle_)\d+")
"""In the name of the model's class: torch counts what a process has traced."""


def to_torchscript(model: nn.Module | Int8Model, image_size: int) -> torch.jit.ScriptModule:
    """Return a frozen TorchScript form of a model, with the same outputs at any batch size.

    It has not run yet, which matters for the engines x86 and onednn: each convolution keeps the kernel made
    for the first batch it sees. With batches of another shape, every call looks up kernels and takes 1.1 to
    3 times as long, or up to 18 times after images of another size.

    Args:
        model: float, preferably with folded batch norms, or int8, which is packed for the current engine.
        image_size: side of the example image in pixels; the result takes images of any size.
    """
    module = to_module(model) if isinstance(model, Int8Model) else model.eval()
    example = torch.zeros(1, 3, image_size, image_size)
    with quietly(), torch.no_grad():
        # Traced, not scripted: torch's int8 layers check the rank of their input in branches that would
        # stay in a scripted graph and take a tenth of the time of a small batch. The model has no
        # control flow that depends on its input.
        traced = torch.jit.trace(module, example, check_trace=False).eval()
        # Freezing packs the int8 weights again, which discards the kernels made for the trace.
        return torch.jit.freeze(traced, ["training"])


def pack_torchscript(scripted: torch.jit.ScriptModule, metadata: Metadata) -> bytes:
    """Return the content of a file: with the same torch, equal models and metadata give equal bytes."""
    written, packed = io.BytesIO(), io.BytesIO()
    with quietly():
        torch.jit.save(scripted, written, _extra_files={METADATA_FILE: json.dumps(metadata.to_dict())})
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(packed, "w") as target:
        for name in source.namelist():
            # The first hold source locations, with paths of this machine; the other is a checksum of them.
            if name.endswith((".debug_pkl", "/serialization_id")):
                continue
            content = source.read(name)
            if name.endswith((".py", "/data.pkl")):
                content = TRACE_NUMBER.sub("0", content.decode("latin1")).encode("latin1")
            target.writestr(zipfile.ZipInfo(TRACE_NUMBER.sub("0", name)), content)
    return packed.getvalue()


def save_torchscript(path: str | os.PathLike, scripted: torch.jit.ScriptModule, metadata: Metadata) -> None:
    """Write a model and its metadata.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file stays whole.
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(pack_torchscript(scripted, metadata))


def float_forms(model: nn.Module, image_size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the ways to run a float model in TorchScript, by name; the fastest depends on the CPU.

    Args:
        model: in eval mode, plain or already TorchScript; freezing folds its batch norms.
        image_size: side in pixels.
    """
    with quietly():
        frozen = model if isinstance(model, torch.jit.ScriptModule) else to_torchscript(model, image_size)
        return {
            "frozen TorchScript": frozen,
            "TorchScript optimized for inference (oneDNN)": torch.jit.optimize_for_inference(frozen),
        }
