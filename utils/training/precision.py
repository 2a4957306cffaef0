"""Training in bfloat16, where that is faster."""

from argparse import ArgumentParser, Namespace

import torch

from utils.common.errors import UserError
from utils.training.kernels import build


def add_amp_argument(parser: ArgumentParser) -> None:
    """--amp."""
    parser.add_argument(
        "--amp",
        action="store_true",
        help="train in bfloat16 where that is safe: on a GPU, or a CPU that computes with it (and g++)",
    )


def check_amp(args: Namespace, device: torch.device) -> None:
    """Check --amp before the work starts.

    Raises:
        UserError: the CPU that the run trains on does not compute with bfloat16.
    """
    if args.amp and device.type == "cpu" and not is_fast_in_bfloat16():
        raise UserError(
            "--amp on a CPU needs one that computes with bfloat16 (AVX512-BF16, AMX) and a C++ compiler, "
            "such as g++: without them this model is slower in bfloat16"
        )


def is_fast_in_bfloat16() -> bool:
    """Whether training on this machine's CPU is faster in bfloat16."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and build.available()
