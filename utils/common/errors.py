"""The one kind of error that the user can fix, and how a script ends because of it."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""


def one_line(text: object) -> str:
    """Return a message that may have several lines as a single line."""
    return " ".join(str(text).split())


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; exit with code 2 and one line on bad input, with 130 on Ctrl-C.

    SIGTERM, which batch systems send before they end a job, is handled as Ctrl-C: files are closed and
    the message names the checkpoint.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        _end("error: out of memory: give a smaller --batch_size or --image_size", EXIT_BAD_INPUT)


def _end(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
