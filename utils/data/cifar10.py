"""CIFAR-10 (Krizhevsky, 2009, https://www.cs.toronto.edu/~kriz/cifar.html), downloaded on first use."""

import io
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from utils.common.errors import UserError, one_line, printable
from utils.data.image_folder import LabelledImages

NETWORK_TIMEOUT_S = 20.0
LARGEST_FILE = 2**28
"""Bytes; the archive has 170 million."""


def load(data_dir: Path) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """Return the training images, the test images and the class names.

    Raises:
        UserError: the files are missing or damaged, and the download failed or would write through a link.
    """
    # torchvision takes a second to import, and not every data set needs it.
    from torchvision.datasets import CIFAR10

    if os.path.lexists(data_dir) and not data_dir.is_dir():
        raise UserError(f"{data_dir} is not a folder: give the right --data_dir")
    folder = data_dir / CIFAR10.base_folder
    names = ["readme.html", CIFAR10.meta["filename"]]
    names += [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    paths = [folder.with_name(CIFAR10.filename), *(folder / name for name in names)]
    was_there = os.path.lexists(folder)
    try:
        for path in paths:
            # A FIFO would block for ever, and so, nearly, would the checksum of a huge file.
            if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST_FILE):
                raise UserError(f"{path} is not a regular file of CIFAR-10: remove it")
        try:
            train = CIFAR10(data_dir, train=True)  # checks the files
        except RuntimeError:
            for path in [folder, *paths]:
                if path.is_symlink():
                    raise UserError(f"{path} is a link, and a download would follow it: remove it") from None
            if not was_there:
                print(f"downloading CIFAR-10 into {printable(str(data_dir))}", flush=True)
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
    return _labelled(train.data, train.targets), _labelled(test.data, test.targets), train.classes


def _labelled(images: np.ndarray, labels: list[int]) -> LabelledImages:
    # The files store each colour plane by plane; the copy is channels last, as the other sources are.
    return torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(labels)


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Set a timeout for new sockets; by default they wait minutes for a server that does not answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _progress_bar_on_terminals_only() -> AbstractContextManager:
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
