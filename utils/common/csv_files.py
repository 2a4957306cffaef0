"""Read CSV files that people edit; every error names the file, line and column."""

import csv
import difflib
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from utils.common.errors import UserError
from utils.common.files import atomic_write, check_input

DECIMAL_COMMA = re.compile(r"^(-?\d+),(\d+)$")
T = TypeVar("T", int, float)


@dataclass(frozen=True)
class Row:
    """A row below the header: its file, line number and cells, and how the header spells each column."""

    path: str | os.PathLike
    line: int
    cells: dict[str, str]
    spelling: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def error(self, column: str, message: str) -> UserError:
        """Return the error to raise for the cell in a column."""
        return UserError(f"{self.path} line {self.line}, column {self.spelling[column]}: {message}")

    def fraction(self, column: str, about: str) -> float:
        """Return the number from 0 to 1 in a column.

        Args:
            column: its name.
            about: what the row describes, for the message.

        Raises:
            UserError: the cell is not a number or lies outside [0, 1].
        """
        text = self[column]
        if not text:
            raise self.error(column, f"no number for {about}: give one from 0 to 1")
        where = f"{text!r} for {about}"
        if text.endswith("%"):
            raise self.error(column, f"{where} is a percentage: write a fraction, such as 0.5 for 50%")
        try:
            # float() would accept 1_000 as well, which can only be a mistake here.
            value = float(text.replace("_", "?"))
        except ValueError:
            advice = "a decimal point, as in 0.5" if "," in text else "a number from 0 to 1"
            raise self.error(column, f"{where} is not a number: write {advice}") from None
        if not 0 <= value <= 1:  # true for NaN as well
            raise self.error(column, f"{where} is outside [0, 1]: write a fraction, such as 0.5")
        return value

    def number(self, column: str, kind: type[T]) -> T:
        """Return the finite number of a kind, int or float, in a column.

        Raises:
            UserError: the cell holds anything else.
        """
        try:
            # Both would accept 1_000 as well, which can only be a mistake here.
            value = kind(self[column].replace("_", "?"))
            if math.isfinite(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise self.error(column, f"{self[column]!r} is not a {'whole' if kind is int else 'finite'} number")


def read_csv(
    path: str | os.PathLike,
    what: str,
    columns: Sequence[str],
    made_by: str,
    aliases: Mapping[str, str],
    *,
    is_growing: bool = False,
) -> list[Row]:
    """Return the rows of a CSV file that has `columns`, in any order, and possibly others.

    Windows line endings, spaces around cells, blank lines and a byte order mark are accepted, as are
    semicolons or tabs between cells, and then decimal commas.

    Args:
        path: the file.
        what: what messages call the file.
        columns: the required columns.
        made_by: the script that writes such a file, for messages.
        aliases: other names that a header may use for a column: {other: column}.
        is_growing: whether the file is written row by row, so that it may have no rows yet and may end in
            a line that was cut off, which is ignored.

    Raises:
        UserError: the file is missing, empty, not text, or not a table with these columns.
    """
    try:
        text = check_input(path, what).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: save it as CSV (UTF-8)") from error
    if is_growing:
        text = text[: text.rfind("\n") + 1]
    first = next(filter(str.strip, text.splitlines()), "")
    delimiter = "," if "," in first else next((one for one in ";\t" if one in first), ",")
    # Strict, because an unclosed quote would otherwise swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        stripped = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV ({error}): check its quotes") from error
    if delimiter != ",":
        stripped = [(line, [DECIMAL_COMMA.sub(r"\1.\2", cell) for cell in cells]) for line, cells in stripped]
    lines = [(line, cells) for line, cells in stripped if any(cells)]
    if not lines:
        raise UserError(f"{path} is empty: recreate it with {made_by}")
    (_, header), *body = lines
    names = [aliases.get(name, name) for name in header]
    for column in columns:
        spellings = [spelling for spelling, name in zip(header, names, strict=True) if name == column]
        if len(spellings) > 1:
            raise UserError(f"{path} has two columns {' and '.join(dict.fromkeys(spellings))}: remove one")
        if spellings:
            continue
        raise UserError(
            f"{path} has no column {column} (it has {', '.join(header)[:200]}): "
            f"it needs the columns {','.join(columns)}, as {made_by} writes them"
        )
    if not (body or is_growing):
        raise UserError(f"{path} has a header but no rows: recreate it with {made_by}")
    for line, cells in body:
        if len(cells) != len(header):
            raise UserError(
                f"{path} line {line} has {len(cells)} cells, the header has {len(header)}: "
                "separate cells with a comma, and write numbers with a decimal point, as in 0.5"
            )
    spelling = dict(zip(names, header, strict=True))
    return [Row(path, line, dict(zip(names, cells, strict=True)), spelling) for line, cells in body]


def write_csv(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a header and rows; floats keep every digit.

    Raises:
        UserError: as `atomic_write`.
    """
    with atomic_write(path) as temporary:
        text = "".join(map(format_line, [columns, *rows]))
        # Names of files may hold bytes that are not UTF-8.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def format_line(cells: Sequence[object]) -> str:
    """Return cells as a line of a CSV file, including the newline."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `: did you mean ...?` with the closest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ""
