"""Run scripts of this repository one after another, as a person would from the shell."""

import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from utils.common.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def data_flags(args: Namespace) -> list[str]:
    """Return the flags of `cli.add_data_arguments` that pass the same data set on to another script."""
    given = {name: getattr(args, name) for name in ("dataset", "data_dir", "image_size", "val_size")}
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def command_line(script: str, *argv: object) -> str:
    """Return the command that a person would type to run a script."""
    return shlex.join(["python", script, *map(str, argv)])


def run_script(heading: str, script: str, *argv: object) -> dict[str, Any]:
    """Print the heading and the command of a script, and run it with this Python.

    Returns:
        script, command and seconds.

    Raises:
        UserError: the script failed; it has printed the reason.
    """
    command = command_line(script, *argv)
    print(f"\n{heading}\n$ {command}", flush=True)
    start = time.perf_counter()
    # A relative path, so that a record shows the command that was printed here. Unbuffered, so that
    # output appears as the script prints it.
    path = os.path.relpath(REPOSITORY / script)
    with subprocess.Popen([sys.executable, "-u", path, *map(str, argv)]) as process:
        process.wait()
    if process.returncode:
        raise UserError(f"{script} ended with exit code {process.returncode}: see above")
    return {"script": script, "command": command, "seconds": round(time.perf_counter() - start, 1)}
