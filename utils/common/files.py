"""Atomic writes, and checks of input and output paths."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from utils.common.distributed import is_main
from utils.common.errors import UserError

BYTES_PER_MB = 2**20
"""MB means 2**20 bytes throughout this project, as in the published table."""


def file_size_mb(path: str | os.PathLike) -> float:
    """Return the size of a file on disk in MB."""
    return os.path.getsize(path) / BYTES_PER_MB


def check_input(path: str | os.PathLike, what: str) -> Path:
    """Return the path of an input file after checking that it can be read.

    Raises:
        UserError: the file does not exist, is a folder, or cannot be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{what} {path} is a folder: give the path of a file")
        if not path.is_file():
            raise UserError(f"{what} {path} does not exist: check the path")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be reached ({error.strerror}): check the path") from error
    if not os.access(path, os.R_OK):
        raise UserError(f"{what} {path} may not be read: check its permissions")
    return path


def check_output(path: str | os.PathLike, *, force: bool) -> Path:
    """Return the path of an output file after creating its folder and checking that it can be written.

    Scripts call this before they start to work.

    Raises:
        UserError: the file exists and `force` is off, or it cannot be written.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the name of a file to write")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file: give the name of a file to write")
        if path.exists() and not force:
            raise UserError(f"{path} exists: give --force to overwrite it, or another name")
        temporary = _temporary_beside(path)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        # Permission bits do not say everything (read-only mounts, root), so create a file to find out.
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): give the name of a file that can be"
        ) from error
    return path


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds.

    Symbolic links and the permissions of an existing file are preserved. In a distributed run, only the
    main process's file is kept.

    Raises:
        UserError: the disk is full or the folder is not writable; the old file is left intact.
    """
    temporary = _temporary_beside(path)
    try:
        yield temporary
        if not is_main():
            return
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        target = os.path.realpath(path)
        if os.path.exists(target):
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise _could_not_write(path, error.strerror or str(error)) from error
    except RuntimeError as error:
        # After a failed write, torch.save complains about the state of its stream instead.
        if "inline_container" not in str(error):
            raise
        raise _could_not_write(path, "is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_torch(path: str | os.PathLike, content: Any) -> None:
    """Call `torch.save` within `atomic_write`; the bytes do not depend on the file's name.

    Raises:
        UserError: as `atomic_write`.
    """
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        # Given a path, torch would store the temporary name in the file.
        torch.save(content, file)


def _temporary_beside(path: str | os.PathLike) -> Path:
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _could_not_write(path: str | os.PathLike, reason: str) -> UserError:
    return UserError(f"{path} could not be written ({reason}); what stood there before is whole")
