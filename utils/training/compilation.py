"""Training with torch.compile; the compiled model shares its weights with the original."""

from typing import Any

import torch
from torch import nn

from utils.common import distributed
from utils.common.errors import UserError, one_line

LONGEST_REASON = 200


def check_compiler(device: torch.device) -> None:
    """Check --compile before the work starts, by compiling something small.

    Raises:
        UserError: there is no compiler, it does not work, or the run has several processes.
    """
    if distributed.world_size() > 1:
        raise UserError("--compile is for a run of one process: leave it out, or start it without torchrun")
    try:
        compiled(nn.ReLU())(torch.ones(2, device=device, requires_grad=True)).sum().backward()
    except Exception as error:
        # What is raised depends on what is missing: compiler, headers, a folder to write to.
        reason = one_line(error)[:LONGEST_REASON]
        raise UserError(
            f"--compile needs a C++ compiler that works, such as g++: install one, or leave it out ({reason})"
        ) from error


def compiled(model: nn.Module) -> Any:
    """Return what to call instead of `model`; compiles at the first call and when shapes or strides change.

    The model itself is not changed, so copies, state_dict and evaluation work as before. Dropout draws
    the same numbers as without compilation.
    """
    return torch.compile(model, dynamic=False, options={"fallback_random": True})
