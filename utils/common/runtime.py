"""Set up a process (seed, threads, allocator), and record a run with its versions and CPU."""

import ctypes
import json
import os
import platform
import random
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.common import distributed, files
from utils.common.errors import UserError
from utils.common.files import atomic_write

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # as in glibc's malloc.h


def set_up(seed: int, threads: int | None, parallel: bool = False) -> None:
    """Seed every random generator, set the number of threads and keep freed memory in the process.

    Args:
        seed: for every random generator.
        threads: number of CPU threads of this process; None for torch's default.
        parallel: whether the script can share its work among the processes that torchrun starts.

    Raises:
        UserError: torchrun started several processes of a script that runs as one.
    """
    if parallel:
        distributed.start()
    elif distributed.launched():
        raise UserError("this script runs as one process: start it with python instead of torchrun")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Make glibc reuse large blocks instead of returning them to the system; no-op for other C libraries.

    By default each activation is mapped anew in every step and its pages are faulted in again, which
    takes almost half of a training step on a CPU.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # Allocate blocks of any size on the heap (glibc caps the mmap threshold at 32 MiB, and activations
    # are often larger), grow the heap in large steps and never trim it.
    for parameter, value in ((M_MMAP_MAX, 0), (M_TOP_PAD, 2**28), (M_TRIM_THRESHOLD, -1)):
        libc.mallopt(parameter, value)


def cpu_name() -> str:
    """Return the processor's name as the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute."""
    # Takes a second, so only where a version is recorded. importlib.metadata would drop "+cu130".
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which torch.load refuses
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
    }


def plain(value: Any) -> Any:
    """Convert a value to plain types, which JSON and `torch.load(weights_only=True)` accept."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return str(value)
    return value


def check_outputs(args: Namespace, *flags: str, also: Iterable[Path] = ()) -> None:
    """Check, before the work, that the outputs can be written and are no other file of the run; lock them.

    Args:
        args: with --force, and --record if the script has it. Whatever other argument names a file that
            exists is taken for an input.
        flags: the names of the script's other outputs.
        also: outputs that no flag names.

    Raises:
        UserError: a file exists and --force is off, it cannot be written, two of them are the same, or
            another process is writing one.
    """
    values = {f"--{name}": value for name, value in vars(args).items()}
    names = [f"--{name}" for name in (*flags, "record")]
    outputs = {name: values.pop(name, None) for name in names} | {f"the output {p}": p for p in also}
    inputs = {name: [v for v in _texts(value) if os.path.isfile(v)] for name, value in values.items()}
    files.check_outputs(outputs, inputs, force=args.force)
    for path in filter(None, outputs.values()):
        files.lock(path)
    # Another run may have written one before it was locked.
    files.check_outputs(outputs, inputs, force=args.force)


def _texts(value: object) -> list[str]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


def write_record(path: str | os.PathLike, args: Namespace, results: dict[str, Any]) -> None:
    """Write results as JSON, together with the command, its arguments, versions and CPU."""
    record = {
        "command": " ".join(["python", *sys.argv]),
        "arguments": plain(args),
        "versions": versions(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "results": plain(results),
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
