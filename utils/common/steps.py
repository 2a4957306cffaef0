"""Running one script of this repository after another, as a person would from the shell."""

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from utils.common.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def command_line(script: str, *argv: object) -> str:
    """What a person would type to run a script."""
    return shlex.join(["python", script, *map(str, argv)])


def run_script(heading: str, script: str, *argv: object) -> dict[str, Any]:
    """Run one script with this Python; print the heading, the command, and what it prints as it comes.

    Returns:
        script, command, seconds and the printed lines.

    Raises:
        UserError: the script did not end well; it has said why.
    """
    command = command_line(script, *argv)
    print(f"\n{heading}\n$ {command}", flush=True)
    start = time.perf_counter()
    printed = []
    # Unbuffered, so that what a script prints is seen as it comes.
    with subprocess.Popen(
        [sys.executable, "-u", str(REPOSITORY / script), *map(str, argv)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(line.rstrip("\n"))
    if process.returncode:
        raise UserError(f"{script} ended with exit code {process.returncode}: see above")
    return {
        "script": script,
        "command": command,
        "seconds": round(time.perf_counter() - start, 1),
        "printed": printed,
    }
