"""Builds kernels.cpp once, with the machine's C++ compiler, and calls it.

The compiler is optional: `available` says whether one works. Without it torch's own operations train.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.common.files import sha256

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
LANES = 16
"""Channels that a kernel processes at once."""
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
TAPS = 9
SECONDS_TO_COMPILE = 300
"""A compiler that takes longer hangs; the kernels take 20 s."""


def available() -> bool:
    """Return whether this machine has a C++ compiler that builds the kernels."""
    return _library() is not None


def takes(x: Tensor, pixels_a_row: int = 1) -> bool:
    """Return whether the kernels support maps (N, C, H, W) of this dtype, size and layout."""
    return (
        x.device.type == "cpu"
        and x.dtype in TYPES
        and pixels_a_row * x.shape[1] % LANES == 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def batch_norm_sums(rows: Tensor, running_mean: Tensor) -> Tensor:
    """Sum `x - running_mean` and its square over all pixels; the result is (2, C), float64.

    Args:
        rows: (pixels / n, n * C), n pixels per row.
        running_mean: float32 (C,).
    """
    sums = _sums(rows)
    _call("batch_norm_sums", rows.dtype, rows, running_mean, *rows.shape, len(running_mean), sums)
    return _folded(sums, len(running_mean))


def batch_norm_parameters(sums: Tensor, count: int, norm: nn.BatchNorm2d, row: int) -> Tensor:
    """Return mean, inverse standard deviation, scale and shift, (4, row); update the running statistics.

    Args:
        sums: from `batch_norm_sums`, over all `count` pixels.
        norm: with weight, bias and running statistics.
        row: n * C, the length of the rows to normalize.
    """
    parameters = torch.empty(4, row)
    _call(
        "batch_norm_parameters", torch.float32, sums, count, norm.weight, norm.bias, norm.eps, norm.momentum,
        row, norm.num_features, norm.running_mean, norm.running_var, parameters,
    )  # fmt: skip
    return parameters


def batch_norm_forward(rows: Tensor, parameters: Tensor, has_relu6: bool) -> Tensor:
    """Return `x * scale + shift` for rows (pixels / n, n * C), followed by ReLU6 if `has_relu6`."""
    y = torch.empty_like(rows)
    _call("batch_norm_forward", rows.dtype, rows, parameters, *rows.shape, has_relu6, y)
    return y


def batch_norm_backward_sums(
    grad_rows: Tensor, rows: Tensor, parameters: Tensor, channels: int, has_relu6: bool
) -> Tensor:
    """Sum the gradient before the ReLU6, and its product with `x - mean`; the result is (2, C), float64."""
    sums = _sums(rows)
    _call(
        "batch_norm_backward_sums", rows.dtype, grad_rows, rows, parameters, *rows.shape, channels, has_relu6,
        sums,
    )  # fmt: skip
    return _folded(sums, channels)


def batch_norm_backward(
    grad_rows: Tensor, rows: Tensor, parameters: Tensor, sums: Tensor, count: int, has_relu6: bool
) -> Tensor:
    """Return the gradient with respect to the rows.

    Args:
        sums: from `batch_norm_backward_sums`, over all `count` pixels.
    """
    row = rows.shape[1]
    of_sums = torch.empty(2, row)
    _call(
        "batch_norm_backward_parameters", torch.float32, sums, count, parameters, row, sums.shape[1], of_sums
    )
    grad_x = torch.empty_like(rows)
    _call(
        "batch_norm_backward",
        rows.dtype,
        grad_rows,
        rows,
        parameters,
        of_sums,
        *rows.shape,
        has_relu6,
        grad_x,
    )
    return grad_x


def _sums(rows: Tensor) -> Tensor:
    return torch.empty(2 * rows.shape[1], dtype=torch.float64)


def _folded(sums: Tensor, channels: int) -> Tensor:
    return sums[: 2 * channels].view(2, channels)


def depthwise_forward(x: Tensor, taps: Tensor, stride: int) -> Tensor:
    """Convolve (N, C, H, W), channels last, with 3x3 depthwise filters and padding 1.

    Args:
        taps: float32 (9, C), contiguous.
        stride: 1 or 2.
    """
    count, channels, height, width = x.shape
    size = (count, channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
    y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
    _call("depthwise_forward", x.dtype, x, taps, count, height, width, channels, stride, y)
    return y


def depthwise_backward_input(grad_y: Tensor, taps: Tensor, stride: int, size: torch.Size) -> Tensor:
    """Return the gradient with respect to the input, which has the given size."""
    if stride == 1:
        return depthwise_forward(grad_y, taps.flip(0).contiguous(), 1)
    count, channels, height, width = size
    grad_x = torch.empty(size, dtype=grad_y.dtype, memory_format=torch.channels_last)
    _call(
        "depthwise_backward_input_stride2", grad_y.dtype, grad_y, taps, count, height, width, channels, grad_x
    )
    return grad_x


def depthwise_backward_weight(grad_y: Tensor, x: Tensor, stride: int) -> Tensor:
    """Return the gradient with respect to the taps, float32 (9, C)."""
    count, channels, height, width = x.shape
    grad_taps = torch.empty(TAPS, channels)
    _call("depthwise_backward_weight", x.dtype, grad_y, x, count, height, width, channels, stride, grad_taps)
    return grad_taps


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call the kernel for this dtype; tensors are passed as addresses."""
    getattr(_library(), f"{name}_{TYPES[dtype]}")(*map(_as_c, arguments))


def _as_c(argument: Tensor | int | float | bool) -> ctypes.c_void_p | ctypes.c_long | ctypes.c_double:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_long(argument)


@cache
def _library() -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError, RuntimeError):  # RuntimeError: there is no home folder
        return None


def _build(compiler: str) -> Path:
    """Return the library in the user's cache, compiled first if this source was not yet for this machine."""
    source = SOURCE.read_bytes()
    flags = subprocess.run(
        [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull],
        capture_output=True,
        check=True,
        timeout=SECONDS_TO_COMPILE,
    ).stdout
    key = hashlib.sha256(b"\0".join([source, " ".join(FLAGS).encode(), flags])).hexdigest()[:16]
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder, stem = cache_home / "mobilenetv2-kernels", f"{platform.machine()}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    # The name holds the checksum of the content: a damaged library would end the process when it is loaded.
    for library in folder.glob(f"{stem}-*.so"):
        if library.name == f"{stem}-{sha256(library)}.so":
            return library
    # Several processes may build at the same time: each has its own folder, and the last one wins.
    with tempfile.TemporaryDirectory(dir=folder) as own:
        made = Path(own) / "kernels.so"
        subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(made)],
            capture_output=True,
            check=True,
            timeout=SECONDS_TO_COMPILE,
        )
        return made.replace(folder / f"{stem}-{sha256(made)}.so")
