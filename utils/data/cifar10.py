"""CIFAR-10 (Krizhevsky, 2009, https://www.cs.toronto.edu/~kriz/cifar.html), downloaded on first use."""

import io
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from utils.common.errors import UserError, one_line
from utils.data.image_folder import LabelledImages

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

NETWORK_TIMEOUT_S = 20.0


def load(data_dir: Path) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """The train and the test images and the class names.

    Raises:
        UserError: the files are missing or damaged, and the download failed.
    """
    from torchvision.datasets import CIFAR10  # takes a second, and only this needs it

    folder = data_dir / CIFAR10.base_folder
    was_there = folder.exists()
    if not was_there:
        print(f"downloading CIFAR-10 into {data_dir}", flush=True)
    try:
        with _network_timeout(NETWORK_TIMEOUT_S), _progress_bar_on_terminals_only():
            train = CIFAR10(data_dir, train=True, download=True)
        test = CIFAR10(data_dir, train=False)
    except (OSError, RuntimeError, HTTPException) as error:
        state = f"{folder} is damaged" if was_there else f"CIFAR-10 is not in {data_dir}"
        remove = f"remove {folder} and " if was_there else ""
        raise UserError(
            f"{state} and could not be downloaded ({one_line(error)[:120]}): {remove}connect to the network, "
            "or use --dataset folder (your own images) or --dataset synthetic (drawn by the project)"
        ) from error
    return _labelled(train), _labelled(test), train.classes


def _labelled(dataset: "CIFAR10") -> LabelledImages:
    # The files hold planes of one colour; the copy holds pixels, as the other sources do.
    return torch.from_numpy(np.ascontiguousarray(dataset.data)), torch.tensor(dataset.targets)


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Give up on a server that does not answer; by default a socket waits for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _progress_bar_on_terminals_only() -> AbstractContextManager:
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
