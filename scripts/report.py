"""Write the numbers under results/ into the Markdown pages, and draw them as a PNG in results/.

The same records give the same text and the same picture, byte for byte. The text between
`<!-- begin BLOCK -->` and `<!-- end BLOCK -->` is replaced by what BLOCKS makes of the records (the end
marker has only the first word of the block's name). Without records the picture is not drawn.
"""

import argparse
import re
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.reporting.tables import BLOCKS, model_rows
from utils.common import cli, errors
from utils.common.errors import UserError
from utils.common.files import atomic_write, check_input

BLOCK = re.compile(r"(<!-- begin ((\w+)[^>\n]*) -->\n).*?(<!-- end \3 -->)", re.DOTALL)
PAGES = ("README.md", "docs/*.md", "benchmarks/README.md")
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# The fourth is QAT's, whose points often lie on those of PTQ per channel: a cross shows inside a square.
MARKERS = ("o", "^", "s", "x", "D", "v", "*", "h", "P", "<", ">", "p", "d", "8", "X", "H")
SMALLEST_ERROR_PCT = 0.01


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--results_dir", default="results", help="folder of the records")
    parser.add_argument(
        "--pages", "--readme", nargs="+", help=f"files to write into (default: {' '.join(PAGES)})"
    )
    return parser


def fill(text: str, results: Path) -> str:
    """Return the text with every block rewritten from the records in `results`.

    Raises:
        UserError: a block has an unknown name, or a record is malformed.
    """

    def replace(match: re.Match) -> str:
        begin, name, _, end = match.groups()
        if name not in BLOCKS:
            raise UserError(f"block {name!r} is unknown: it may be one of {', '.join(BLOCKS)}")
        try:
            return begin + BLOCKS[name](results) + end
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"a record for {name} under {results} is not valid: {what}") from error

    return BLOCK.sub(replace, text)


def draw_accuracy_against_size(results: Path, path: Path) -> bool:
    """Draw the models of the results table: weights by color, formats by marker.

    Returns:
        Whether there was a model of ours to draw.
    """
    # Here, since they take a second; a Figure without pyplot needs no display.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    rows, _ = model_rows(results)
    if all(row["name"].startswith("published/") for row in rows):
        return False
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(dict.fromkeys(row["weights"] for row in rows), cycle(COLORS), strict=False))
    markers = dict(zip(dict.fromkeys(row["form"] for row in rows), cycle(MARKERS), strict=False))
    hollow: dict[str, Any] = {"linestyle": "", "markerfacecolor": "none"}
    for row in rows:
        axes.plot(
            row["file_size_mb"], max(100 - row["accuracy_pct"], SMALLEST_ERROR_PCT), **hollow,
            marker=markers[row["form"]], color=colors[row["weights"]], markersize=10, markeredgewidth=1.8,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="size of the file, MB", ylabel="accuracy on test, %")
    # Errors on a log scale, so that good models do not lie on one line, labelled with their accuracies.
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda size_mb, _: f"{size_mb:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(lambda error_pct, _: f"{100 - error_pct:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(LogLocator(subs=()))
    weights = [Line2D([], [], linewidth=6, color=color, label=name) for name, color in colors.items()]
    forms = [Line2D([], [], **hollow, marker=mark, color="0.3", label=name) for name, mark in markers.items()]
    figure.legend(handles=weights, loc="outside upper center", ncols=2, frameon=False)
    figure.legend(handles=forms, loc="outside lower center", ncols=4, frameon=False)
    with atomic_write(path) as temporary:
        # The version in the file would make equal pictures differ.
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    return True


def main(args: argparse.Namespace) -> None:
    """Fill the pages from the results and draw the picture."""
    results = Path(args.results_dir)
    if not results.is_dir():
        raise UserError(f"--results_dir {args.results_dir} is not a folder: give the folder of the records")
    pages = args.pages or sorted(path for pattern in PAGES for path in Path().glob(pattern))
    texts = {page: check_input(page, "page").read_text() for page in pages}
    filled = {page: fill(text, results) for page, text in texts.items()}
    picture = results / "accuracy_against_size.png"
    if draw_accuracy_against_size(results, picture):
        print(f"wrote {picture}")
    for page, text in filled.items():
        if text == texts[page]:
            print(f"{page} is up to date")
            continue
        with atomic_write(page) as temporary:
            temporary.write_text(text)
        print(f"wrote {page}")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
