"""Runs a script as `python SCRIPT ARGS` would, from a process that has torch imported already.

Importing torch and torchvision takes seconds; a forked process starts with them in memory.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PRELOADED = ["torch", "torchvision", "pandas", "torch.ao.quantization"]


def start_server() -> None:
    """Choose what the server that all script processes are forked from imports."""
    multiprocessing.set_forkserver_preload(PRELOADED)


def run(
    argv: list[str], timeout: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a script from the repository's root; its exit code and what it printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        names = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (out, err)]
        process = start(argv, *names, env or {})
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(argv, timeout)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(argv, process.exitcode, out.read(), err.read())


def start(argv: list[str], out: str, err: str, env: dict[str, str]) -> multiprocessing.Process:
    """Start a script that appends what it prints to the files `out` and `err`."""
    process = multiprocessing.get_context("forkserver").Process(
        target=_run_script, args=(argv, out, err, env)
    )
    process.start()
    return process


def run_until(
    argv: list[str], ready: Callable[[], bool], sign: signal.Signals, timeout: float = 120
) -> subprocess.Popen:
    """Start a script and send it `sign` as soon as `ready()`; its exit code and output."""
    process = subprocess.Popen(
        [sys.executable, *argv],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C; a user's foreground one does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if ready():
            process.send_signal(sign)
            break
        time.sleep(0.01)
    process.wait(60)
    return process


def _run_script(argv: list[str], out: str, err: str, env: dict[str, str]) -> None:
    for name, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update(env)
    os.chdir(REPOSITORY)
    sys.argv = argv
    # Python puts a script's own folder first.
    sys.path[0] = str(REPOSITORY / Path(argv[0]).parent)
    code: object = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
