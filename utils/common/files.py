"""Atomic writes, locks, and checks of input and output paths."""

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from utils.common.distributed import is_main
from utils.common.errors import UserError, at_end

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
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_temporaries_of_killed_runs(target)
        # Permission bits do not say everything (read-only mounts, root), so create a file to find out.
        _create_temporary(target).unlink()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): give the name of a file that can be"
        ) from error
    return path


Paths = Mapping[str, str | os.PathLike | Iterable[str | os.PathLike] | None]
"""Paths by the flag that gave them; None where the flag was not given."""


def check_outputs(outputs: Paths, inputs: Paths, *, force: bool) -> None:
    """Check every output of a script before its work starts, and that none is an input or another output.

    Raises:
        UserError: as `check_output`, or two flags name the same file.
    """
    seen: dict[Path, str] = {}
    for flag, path in [*_one_by_one(inputs), *_one_by_one(outputs)]:
        file = Path(os.path.realpath(path))
        is_output = flag in outputs
        if is_output and file in seen:
            raise UserError(f"{flag} and {seen[file]} both name the file {path}: give another name")
        seen[file] = flag
        if is_output:
            check_output(path, force=force)


def _one_by_one(paths: Paths) -> Iterator[tuple[str, str | os.PathLike]]:
    for flag, given in paths.items():
        several = [given] if isinstance(given, str | os.PathLike) else given or []
        yield from ((flag, path) for path in several)


_locks: dict[Path, IO[str]] = {}
"""The lock files that this process holds, by what they lock."""


def lock(output: str | os.PathLike) -> None:
    """Lock an output against other runs that would write it, until `unlock` or the end of the process.

    The lock is the system's (flock), so that of a killed run is void. Only the main process of a
    distributed run takes one; where there is no flock, nothing is locked.

    Raises:
        UserError: another process holds the lock, or a file that is no lock has its name.
    """
    target = Path(os.path.realpath(output))
    if target in _locks or not is_main():
        return
    try:
        import fcntl
    except ImportError:  # Windows
        return
    path = target.with_name(f".{target.name}.lock")
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", errors="replace")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"process {file.read().strip()} is writing {output}: wait until it ends, or give another name"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
            return
        raise UserError(f"{path} cannot be locked ({error.strerror}): remove it") from error
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        # The process that held the lock has removed the file since it was opened here.
        file.close()
        lock(output)
        return
    if (held := file.read(32).strip()) and not held.isdecimal():
        file.close()
        raise UserError(f"{path} is not a lock of this project, and its content would be lost: remove it")
    file.seek(0)
    file.truncate()
    print(os.getpid(), file=file, flush=True)
    _locks[target] = file
    at_end.append(lambda: unlock(target))


def unlock(output: str | os.PathLike) -> None:
    """Release the lock of an output, if this process holds one."""
    target = Path(os.path.realpath(output))
    file = _locks.pop(target, None)
    if file:
        # Removed while it is still locked, so that it cannot be the next run's.
        target.with_name(f".{target.name}.lock").unlink(missing_ok=True)
        file.close()


def sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds.

    Symbolic links and the permissions of an existing file are preserved. In a distributed run, only the
    main process's file is kept.

    Raises:
        UserError: the disk is full or the folder is not writable; the old file is left intact.
    """
    target = Path(os.path.realpath(path))
    try:
        temporary = _create_temporary(target)
    except OSError as error:
        raise _could_not_write(path, error.strerror or str(error)) from error
    try:
        yield temporary
        if not is_main():
            return
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if target.exists():
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


def save_torch(
    path: str | os.PathLike, content: Any, read_back: Callable[[Path], None] = lambda _written: None
) -> None:
    """Call `torch.save` within `atomic_write`; the bytes do not depend on the file's name.

    Args:
        path: of the file.
        content: what torch.save takes.
        read_back: called with the written file before it takes its place; raises if it is not right.

    Raises:
        UserError: as `atomic_write`, or from `read_back`.
    """
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            # Given a path, torch would store the temporary name in the file.
            torch.save(content, file)
        read_back(temporary)


def _create_temporary(target: Path) -> Path:
    """Create an empty file beside `target`, under a name that nobody can have prepared a link for."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return temporary


def _remove_temporaries_of_killed_runs(target: Path) -> None:
    name = re.compile(rf"\.{re.escape(target.name)}\.(\d+)(-\w+)?\.tmp")
    for path in target.parent.iterdir():
        found = name.fullmatch(path.name)
        if found and not _is_running(int(found[1])):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _could_not_write(path: str | os.PathLike, reason: str) -> UserError:
    return UserError(f"{path} could not be written ({reason}); what stood there before is whole")
