"""Aligned tables of plain text."""

import re
from collections.abc import Sequence

from utils.common.errors import printable

NO_VALUE = "–"
# A number with an optional sign, unit or spread: 12, -0.35, 1.2e-05, 99.1 %, 3.9×, 90.1 ± 0.2
NUMBER = re.compile(r"[-+−]?\d[\d.,]*(e[-+]?\d+)?( ?(%|×|ms|MB))?( ± [\d.]+)?")


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an aligned table; columns of numbers are right-aligned, others left-aligned.

    Args:
        headers: one per column, including units.
        rows: one cell per header; None is shown as a dash, a float with two decimals, anything
            else as `str` gives it.

    Returns:
        Lines without trailing spaces, a rule below the headers, no newline at the end.
    """
    cells = [[_format_cell(cell) for cell in row] for row in rows]
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell == NO_VALUE or NUMBER.fullmatch(cell) for cell in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, right, strict=True)
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(headers), rule, *map(line, cells)])


def _format_cell(cell: object) -> str:
    if cell is None:
        return NO_VALUE
    if isinstance(cell, float):
        return f"{cell:.2f}"
    return printable(str(cell))
