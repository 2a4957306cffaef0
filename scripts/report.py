"""Write the numbers under results/ into the README, between markers, and draw them as PNGs beside them.

The same files give the same text and the same pictures, byte for byte. A block begins with
`<!-- begin NAME ARGUMENT -->` and ends with `<!-- end NAME -->`; what stands between the two is
replaced by what BLOCKS makes of the results. A picture without any record is left out.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from scripts.reporting import report_blocks
from scripts.reporting.report_records import Results
from scripts.reporting.result_plots import PICTURES
from scripts.reporting.results_table import results_table
from utils.common import cli, errors
from utils.common.errors import UserError
from utils.common.files import atomic_write, check_input

BLOCK = re.compile(r"(<!-- begin (\w+)(?: (\S+))? -->\n).*?(<!-- end \2 -->)", re.DOTALL)
BLOCKS: dict[str, Callable[[Results, str], str]] = {
    "results_table": results_table,
    "allocation_table": report_blocks.allocation_table,
    "training_benchmark": report_blocks.training_benchmark,
    "scan_benchmark": report_blocks.scan_benchmark,
    "runtimes_benchmark": report_blocks.runtimes_benchmark,
    "step": report_blocks.step,
    "chain_table": report_blocks.chain_table,
}


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--results_dir", default="results", help="where the result files are")
    parser.add_argument("--readme", default="README.md", help="file to write into")
    return parser


def fill(text: str, results: Results) -> str:
    """The text with every block made anew.

    Raises:
        UserError: a block has an unknown name, or its results are missing.
    """

    def replace(match: re.Match) -> str:
        begin, name, argument, end = match.groups()
        if name not in BLOCKS:
            raise UserError(f"block {name!r} is unknown: it may be one of {', '.join(BLOCKS)}")
        return begin + BLOCKS[name](results, argument or "") + end

    return BLOCK.sub(replace, text)


def main(args: argparse.Namespace) -> None:
    """Fill the README from the results and draw the pictures."""
    readme = check_input(args.readme, "README")
    results = Results(Path(args.results_dir))
    if not results.folder.is_dir():
        raise UserError(f"--results_dir {args.results_dir} is no folder: give the one with the records")
    text = readme.read_text()
    filled = fill(text, results)
    for name, draw in PICTURES.items():
        if draw(results, results.folder / name):
            print(f"wrote {results.folder / name}")
    if filled == text:
        print(f"{readme} is up to date")
        return
    with atomic_write(readme) as temporary:
        temporary.write_text(filled)
    print(f"wrote {readme}")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
