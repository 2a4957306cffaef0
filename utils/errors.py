"""The one kind of error that is the user's to mend, and how a script ends on it."""

import sys
from collections.abc import Callable

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""


def one_line(text: object) -> str:
    """Fold a library's message of several lines into one."""
    return " ".join(str(text).split())


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; bad input ends with exit code 2 and one line, Ctrl-C with 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{': ' if interrupt.args else ''}{one_line(interrupt)}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) has gone; the interpreter must not complain once more at exit.
        sys.stderr.close()
        sys.exit(1)
