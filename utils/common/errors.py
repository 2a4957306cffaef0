"""The one kind of error that the user can fix, and how a script ends because of it."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


at_end: list[Callable[[], None]] = []
"""What `run` calls last, however the script ends."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""


def one_line(text: object) -> str:
    """Return a message that may have several lines as a single line."""
    return printable(" ".join(str(text).split()))


def printable(text: str) -> str:
    """Escape what a terminal would act on: names in files may hold any character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; exit with code 2 and one line on bad input, with 130 on Ctrl-C.

    SIGTERM, which batch systems send before they end a job, is handled as Ctrl-C: files are closed and
    the message names the checkpoint.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _make_streams_safe()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _end(f"error: {one_line(error)}", EXIT_BAD_INPUT)
    except KeyboardInterrupt as interrupt:
        _end(f"interrupted{': ' if interrupt.args else ''}{one_line(interrupt)}", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) has gone. Discard what is still in the buffer: otherwise the interpreter
        # reports the same error again when it flushes at exit.
        _discard_stdout()
        sys.exit(1)
    except OSError as error:
        if not _is_stdout_full(error):
            raise
        _discard_stdout()
        _end(f"error: what is printed cannot be written ({error.strerror}): make room", EXIT_BAD_INPUT)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        _end("error: out of memory: give a smaller --batch_size or --image_size", EXIT_BAD_INPUT)
    finally:
        while at_end:
            at_end.pop()()


def _make_streams_safe() -> None:
    """Let no closed stream and no character that a terminal cannot show end a script after its work."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller (`>&-`)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  stays open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_stdout_full(error: OSError) -> bool:
    # Files are written by atomic_write, which turns its errors into UserErrors.
    return error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
