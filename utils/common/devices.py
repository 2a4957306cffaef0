"""Choose the device that a model runs on, and move batches to it. Files always hold CPU tensors."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from utils.common import distributed
from utils.common.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")


def add_device_argument(parser: ArgumentParser, choices: Sequence[str] = DEVICES) -> None:
    """Add --device."""
    parser.add_argument(
        "--device", choices=choices, default="auto", help="auto picks a GPU if there is one, else the CPU"
    )


def choose_device(args: Namespace, choices: Sequence[str] = DEVICES) -> torch.device:
    """Return the device that --device names, and set `args.device` to its type for the records.

    Each process that torchrun starts on a machine gets its own GPU.

    Raises:
        UserError: there is no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kinds = [kind for kind, is_there in available.items() if is_there and kind in choices]
    kind = kinds[0] if args.device == "auto" else args.device
    if kind not in kinds:
        raise UserError(f"--device {kind} is not available: use one of {', '.join(kinds)}, or auto")
    args.device = kind
    if kind != "cuda":
        return torch.device(kind)
    index, count = distributed.local_rank(), torch.cuda.device_count()
    if index >= count:
        raise UserError(f"process {index} finds {count} GPUs on its machine: start one process per GPU")
    torch.cuda.set_device(index)
    return torch.device(kind, index)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model; int8 models have no parameters and run on the CPU."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def on_device(
    batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches moved to `device`; those already there are not copied."""
    for images, labels in batches:
        if device.type == "cuda":
            # A copy from pinned memory overlaps with the computation.
            images, labels = images.pin_memory(), labels.pin_memory()
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
