"""Distributed runs under torchrun; a plain `python` call is a run of one process.

Every process holds the whole model and computes one shard of each batch. Batch norm and dropout see the
whole batch, so a given batch size trains the same model with any number of processes. Only the main
process (rank 0) prints and writes files.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.common.errors import UserError

# gloo and nccl raise plain RuntimeErrors.
SIGNS_OF_A_LOST_PROCESS = ("gloo", "Connection closed", "Connection reset", "NCCL", "Broken pipe")


def launched() -> bool:
    """Return whether torchrun started this process as one of several."""
    return _environment_number("WORLD_SIZE", 1) > 1


def start() -> None:
    """Initialise torch.distributed under torchrun, and silence stdout on non-zero ranks.

    Raises:
        UserError: the other processes cannot be reached.
    """
    if not launched() or dist.is_initialized():
        return
    try:
        # Counts are summed on the CPU, gradients on the model's device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run cannot reach each other ({error})") from error
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  stays open until the process ends


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Return the rank of this process on its machine, from 0."""
    return _environment_number("LOCAL_RANK", 0)


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}, not a whole number: unset it")
    return int(text)


def world_size() -> int:
    """Return the number of processes in the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process is the one that prints and writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has reached this call."""
    # torch's own barrier would occupy a GPU even if --device is cpu.
    all_reduce_sum(torch.zeros(()))


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the main process first, then in the others (a download, a cache)."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def gather(value: Any) -> list[Any]:
    """Return the values of all processes in rank order, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Take the elementwise maximum of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def shard(batch: Tensor) -> Tensor:
    """Return this process's slice of a batch; sizes differ by at most one."""
    return batch.tensor_split(world_size())[rank()]


def is_lost_process(error: RuntimeError) -> bool:
    """Return whether a collective call failed because another process of the run has ended."""
    return world_size() > 1 and any(sign in str(error) for sign in SIGNS_OF_A_LOST_PROCESS)


def check_batch_size(batch_size: int) -> None:
    """Check that every process gets a shard of the same size in a training step.

    Raises:
        UserError: a batch cannot be split evenly.
    """
    if batch_size % world_size():
        raise UserError(
            f"--batch_size {batch_size} cannot be split evenly over {world_size()} processes: give a multiple"
        )
