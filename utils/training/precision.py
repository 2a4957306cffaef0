"""Whether --amp makes training faster on this machine."""

import torch

from utils.common.errors import UserError
from utils.training.kernels import build


def check_amp(device: torch.device) -> None:
    """Check --amp before the work starts.

    Raises:
        UserError: the run trains on a CPU without fast bfloat16.
    """
    if device.type == "cpu" and not is_fast_in_bfloat16():
        raise UserError(
            "--amp on a CPU needs one that computes with bfloat16 (AVX512-BF16, AMX) and a C++ compiler, "
            "such as g++: without them this model is slower in bfloat16"
        )


def is_fast_in_bfloat16() -> bool:
    """Return whether this machine's CPU trains faster in bfloat16."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and build.available()
