"""Argument parsing: one-line errors, checked types, and groups of flags that scripts share."""

import argparse
import difflib
import math
import re
from typing import NoReturn

from utils.common.errors import EXIT_BAD_INPUT, one_line

LARGEST = 10**6
"""Bound of all numbers without one of their own: what is larger is a slip, and fills the memory."""
LARGEST_IMAGE_SIZE = 1024
"""Side in pixels of the largest images that any script takes."""
LARGEST_SEED = 2**32 - 1  # numpy's
MOST_THREADS = 1024  # torch crashes with many more


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Append the default to a help text, unless it is empty or the text names it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_nothing = action.default is None or action.default is False or action.default == []
        if is_nothing or "(default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Show defaults in --help, accept no abbreviated flags, and report errors in one line."""

    def __init__(self, description: str | None) -> None:
        # The first paragraph of a script's docstring says what it does; the rest is for readers of the code.
        super().__init__(
            description=(description or "").split("\n\n")[0],
            formatter_class=DefaultsFormatter,
            allow_abbrev=False,
        )
        self.hints: dict[str, str] = {}
        """What to do instead of giving a flag that does not exist."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        self.exit(
            EXIT_BAD_INPUT, f"error: {self.prog}: {one_line(message)}{self._hint(message)} (see --help)\n"
        )

    def _hint(self, message: str) -> str:
        for flag in re.findall(r"(?<!\S)--\w+", message if message.startswith("unrecognized") else ""):
            if flag in self.hints:
                return f": {self.hints[flag]}"
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            if near:
                return f": did you mean {near[0]}?"
        return ""


def _number(text: str, kind: type, accept, requirement: str):
    try:
        value = kind(text)
        is_fine = math.isfinite(value) and accept(value)
    except (ValueError, OverflowError):
        is_fine = False
    if not is_fine:
        raise argparse.ArgumentTypeError(f"{text!r} must be {requirement}")
    return value


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    return _number(text, int, lambda v: 1 <= v <= LARGEST, f"a whole number from 1 to {LARGEST}")


def non_negative_int(text: str) -> int:
    """Parse an integer of at least 0."""
    return _number(text, int, lambda v: 0 <= v <= LARGEST, f"a whole number from 0 to {LARGEST}")


def image_size(text: str) -> int:
    """Parse the side of an image in pixels."""
    return _number(
        text, int, lambda v: 1 <= v <= LARGEST_IMAGE_SIZE, f"a whole number from 1 to {LARGEST_IMAGE_SIZE}"
    )


def seed(text: str) -> int:
    """Parse a seed that every random generator accepts."""
    return _number(text, int, lambda v: 0 <= v <= LARGEST_SEED, f"a whole number from 0 to {LARGEST_SEED}")


def thread_count(text: str) -> int:
    """Parse a number of CPU threads."""
    return _number(text, int, lambda v: 1 <= v <= MOST_THREADS, f"a whole number from 1 to {MOST_THREADS}")


def positive_float(text: str) -> float:
    """Parse a number above 0."""
    return _number(text, float, lambda v: 0 < v <= LARGEST, f"a number above 0, at most {LARGEST}")


def width_mult(text: str) -> float:
    """Parse a multiplier of a network's channels."""
    return _number(text, float, lambda v: 0.01 <= v <= 10, "a number from 0.01 to 10")


def non_negative_float(text: str) -> float:
    """Parse a number of at least 0."""
    return _number(text, float, lambda v: 0 <= v <= LARGEST, f"a number from 0 to {LARGEST}")


def fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    return _number(text, float, lambda v: 0 <= v <= 1, "a number from 0 to 1")


def fraction_below_one(text: str) -> float:
    """Parse a number from 0 up to, but not including, 1."""
    return _number(text, float, lambda v: 0 <= v < 1, "a number from 0 to below 1")


def percent(text: str) -> float:
    """Parse a percentage from 1 to 100; values below 1 are refused because they look like fractions."""
    return _number(text, float, lambda v: 1 <= v <= 100, "in percent, from 1 to 100")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --dataset, --data_dir, --image_size, --val_size and --normalization."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--dataset",
        choices=("cifar10", "folder", "synthetic"),
        default="cifar10",
        help="cifar10 is downloaded on first use; folder reads DIR/train/<class>/* and "
        "DIR/test/<class>/*; synthetic images are drawn by the project itself",
    )
    group.add_argument("--data_dir", default="data", help="folder of the images")
    group.add_argument(
        "--image_size",
        type=image_size,
        help="resize the images of --dataset folder to this side in pixels "
        "(default: as the weights were trained, or 32)",
    )
    group.add_argument(
        "--val_size",
        type=non_negative_int,
        help="training images held out for validation (default: 5000, or 10 %% of fewer than 50000)",
    )
    add_normalization_argument(group)


def add_normalization_argument(parser: argparse._ActionsContainer) -> None:
    """Add --normalization."""
    parser.add_argument(
        "--normalization",
        type=non_negative_float,
        nargs=6,
        metavar=("MEAN_R", "MEAN_G", "MEAN_B", "STD_R", "STD_G", "STD_B"),
        help="of pixels from 0 to 1 (default: as in the weights file, else measured on the training images)",
    )


def add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --seed and --threads."""
    group = parser.add_argument_group("runtime")
    group.add_argument("--seed", type=seed, default=0, help="seed of every random generator")
    group.add_argument("--threads", type=thread_count, help="CPU threads (default: one per core)")


def add_force_argument(parser: argparse.ArgumentParser) -> None:
    """Add --force."""
    parser.add_argument("--force", action="store_true", help="overwrite existing output files")


def add_record_argument(parser: argparse.ArgumentParser) -> None:
    """Add --record."""
    parser.add_argument(
        "--record",
        metavar="FILE",
        help="write the measured numbers as JSON, with versions, CPU, threads, seed and arguments",
    )
