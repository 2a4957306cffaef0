"""Writing files so that a reader never meets half of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError, one_line

BYTES_PER_MB = 2**20
"""MB means 2**20 bytes everywhere in this project, as in the published table."""


def file_size_mb(path: str | os.PathLike) -> float:
    """Size of a file on disk in MB."""
    return os.path.getsize(path) / BYTES_PER_MB


def check_input(path: str | os.PathLike, what: str) -> Path:
    """The path of an existing, readable file.

    Raises:
        UserError: there is no such file, it is a folder, or it may not be read.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder: give the path of a file")
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist: check the path")
    if not os.access(path, os.R_OK):
        raise UserError(f"{what} {path} may not be read: check its permissions")
    return path


def check_output(path: str | os.PathLike, *, force: bool) -> Path:
    """The path of a file that can be written, its folder made; called before the work starts.

    Raises:
        UserError: the file exists and `force` is off, or nothing can be written there.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file to write")
    if path.exists() and not force:
        raise UserError(f"{path} exists: give --force to overwrite it, or another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell all (read-only mounts, root), so a file is really made.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` if the block ends well.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file stays whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error.strerror or error}; what stood there before is whole"
        ) from error
    except RuntimeError as error:
        # torch's file writers report a full disk as a RuntimeError about the stream.
        if "PytorchStreamWriter" not in str(error) and "write failed" not in str(error):
            raise
        raise UserError(
            f"{path} could not be written: {one_line(error)[:200]}; is the disk full? "
            "What stood there before is whole"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
