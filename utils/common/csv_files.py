"""Read CSV files that people edit; every error names the file, line and column."""

import csv
import difflib
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.common.errors import UserError
from utils.common.files import atomic_write, check_input


@dataclass(frozen=True)
class Row:
    """A row below the header: its file and line number, its cells and the header's spelling by column."""

    path: Path
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
        where = f" for {about}"
        if not text:
            raise self.error(column, f"no number{where}: give one from 0 to 1")
        if text.endswith("%"):
            raise self.error(column, f"{text!r}{where} is in percent: write a fraction, such as 0.5 for 50%")
        try:
            # float() would accept 1_000 as well, which can only be a mistake here.
            value = float(text.replace("_", "?"))
        except ValueError:
            advice = "a decimal point, as in 0.5" if "," in text else "a number from 0 to 1"
            raise self.error(column, f"{text!r}{where} is not a number: write {advice}") from None
        if math.isnan(value):
            raise self.error(column, f"NaN{where} is not a number from 0 to 1: write one")
        if not 0 <= value <= 1:
            raise self.error(column, f"{text}{where} is outside [0, 1]: write a fraction, such as 0.5")
        return value

    def whole_number(self, column: str) -> int:
        """Return the whole number of at least 0 in a column.

        Raises:
            UserError: the cell holds anything else.
        """
        if not self[column].isdecimal():
            raise self.error(column, f"{self[column]!r} is not a whole number of at least 0")
        return int(self[column])

    def number(self, column: str) -> float:
        """Return the finite number in a column.

        Raises:
            UserError: the cell holds anything else.
        """
        try:
            value = float(self[column])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.error(column, f"{self[column]!r} is not a finite number")
        return value


def read_csv(
    path: str | os.PathLike, what: str, columns: Sequence[str], made_by: str, aliases: Mapping[str, str]
) -> list[Row]:
    """Read a CSV file and return its rows, at least one.

    Args:
        path: the file.
        what: what messages call the file.
        columns: the required columns.
        made_by: the script that writes such a file, for messages.
        aliases: other names that a header may have for a column: {other: column}.

    Raises:
        UserError: the file is missing, empty, not text, or not a table with these columns.
    """
    text = read_text(path, what)
    if not text.strip():
        raise UserError(f"{path} is empty: make it again with {made_by}")
    rows = parse_csv(path, text, columns, made_by, aliases)
    if not rows:
        raise UserError(f"{path} has a header and no rows: make it again with {made_by}")
    return rows


def read_text(path: str | os.PathLike, what: str) -> str:
    """Return the text of a file without a leading byte order mark.

    Raises:
        UserError: the file is missing or not text.
    """
    try:
        return check_input(path, what).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: save it as CSV (UTF-8)") from error


def parse_csv(
    path: str | os.PathLike, text: str, columns: Sequence[str], made_by: str, aliases: Mapping[str, str]
) -> list[Row]:
    """Return the rows of a table that has `columns`, in any order, and possibly others.

    Windows line ends, spaces around cells and blank lines are accepted.

    Args:
        path: the file that the text was read from, for messages.
        text: the whole file.
        columns: the required columns.
        made_by: the script that writes such a file, for messages.
        aliases: other names that a header may have for a column: {other: column}.

    Raises:
        UserError: the text is not a table with these columns.
    """
    path = Path(path)
    # Strict, because an unclosed quote would otherwise swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    names: list[str] = []
    rows = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if header is None:
                header = cells
                names = [aliases.get(name, name) for name in header]
                _check_header(path, header, names, columns, made_by)
            elif len(cells) != len(header):
                raise UserError(
                    f"{path} line {reader.line_num} has {len(cells)} cells, the header has {len(header)}: "
                    "separate cells by one comma, and write numbers with a decimal point, as in 0.5"
                )
            else:
                by_name = dict(zip(names, cells, strict=True))
                rows.append(Row(path, reader.line_num, by_name, dict(zip(names, header, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV ({error}): check its quotes") from error
    return rows


def write_csv(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a header and rows; floats keep every digit.

    Raises:
        UserError: as `atomic_write`.
    """
    with atomic_write(path) as temporary:
        temporary.write_text("".join(map(format_line, [columns, *rows])), encoding="utf-8")


def format_line(cells: Sequence[object]) -> str:
    """Return cells as a line of a CSV file, including the newline."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `: did you mean ...?` with the closest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ""


def _check_header(
    path: Path, header: list[str], names: list[str], columns: Sequence[str], made_by: str
) -> None:
    for column in columns:
        if names.count(column) > 1:
            spellings = dict.fromkeys(
                spelling for spelling, name in zip(header, names, strict=True) if name == column
            )
            raise UserError(f"{path} has two columns {' and '.join(spellings)}: remove one")
        if column in names:
            continue
        if len(header) == 1 and any(separator in header[0] for separator in ";\t"):
            raise UserError(f"{path} is not separated by commas: save it as CSV with commas")
        raise UserError(
            f"{path} has no column {column} (it has {', '.join(header)[:200]}): "
            f"its first line is {','.join(columns)}, see {made_by}"
        )
