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
    columns = []
    for header, *cells in zip(headers, *([_format_cell(cell) for cell in row] for row in rows), strict=True):
        is_numeric = all(cell == NO_VALUE or NUMBER.fullmatch(cell) for cell in cells)
        justify = str.rjust if is_numeric else str.ljust
        width = max(map(len, (header, *cells)))
        columns.append([justify(header, width), "-" * width, *(justify(cell, width) for cell in cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _format_cell(cell: object) -> str:
    if cell is None:
        return NO_VALUE
    if isinstance(cell, float):
        return f"{cell:.2f}"
    return printable(str(cell))
