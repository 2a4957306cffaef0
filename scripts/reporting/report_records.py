"""The records under results/ as the report reads them, and the forms that its blocks share."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from utils.common.errors import UserError
from utils.common.files import check_input

T = TypeVar("T")
WRONG_FORM = (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError)
"""What a conversion runs into when a file does not hold what it should."""


class Results:
    """The result files, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self, pattern: str) -> list[str]:
        """The files that match, without `.json`, relative to the folder, in alphabetical order."""
        paths = self.folder.glob(f"{pattern}.json")
        return sorted(path.relative_to(self.folder).with_suffix("").as_posix() for path in paths)

    def need(self, name: str, convert: Callable[[Any], T]) -> T:
        """What `convert` makes of the file's content.

        Raises:
            UserError: there is no such file, or it does not hold what `convert` reads.
        """
        path = check_input(self.folder / f"{name}.json", "result file")
        try:
            return convert(json.loads(path.read_text()))
        except WRONG_FORM as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{path} is not such a record as --record writes ({what}): write it again"
            ) from error

    def take(self, name: str, convert: Callable[[Any], T]) -> T | None:
        """As `need`, but None where there is no such file.

        Raises:
            UserError: the file does not hold what `convert` reads.
        """
        return self.need(name, convert) if (self.folder / f"{name}.json").exists() else None


def number(value: object) -> float:
    """A number that a record holds.

    Raises:
        ValueError: it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return value


def computer(record: dict[str, Any]) -> str:
    """What a record was measured on: CPU, threads, versions."""
    threads, versions = record["threads"], record["versions"]
    return (
        f"{record['cpu']}, {threads} thread{'' if threads == 1 else 's'}, torch {versions['torch']}, "
        f"torchvision {versions['torchvision']}"
    )


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose first column is flushed left, the others right."""
    rule = "|".join(["---", *["--:"] * (len(headers) - 1)])
    return [f"| {' | '.join(headers)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def missing(command: str) -> str:
    """What a block says when none of its records is there.

    Args:
        command: that makes them.
    """
    return f"*Not measured yet: `{command}` does it.*\n"
