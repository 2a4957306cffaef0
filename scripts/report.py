"""Write the numbers under results/ into the Markdown pages, and draw them as PNGs in results/.

The same records give the same text and the same pictures, byte for byte. The text between
`<!-- begin BLOCK -->` and `<!-- end BLOCK -->` is replaced by what BLOCKS makes of the records (the end
marker has only the first word of the block's name). A picture without records is not drawn.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.reporting.tables import BLOCKS, Results
from utils.common import cli, errors
from utils.common.errors import UserError
from utils.common.files import atomic_write, check_input

BLOCK = re.compile(r"(<!-- begin ((\w+)[^>\n]*) -->\n).*?(<!-- end \3 -->)", re.DOTALL)
PAGES = ("README.md", "docs/*.md", "benchmarks/README.md")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--results_dir", default="results", help="folder of the records")
    parser.add_argument(
        "--pages", "--readme", nargs="+", help=f"files to write into (default: {' '.join(PAGES)})"
    )
    return parser


def fill(text: str, results: Results) -> str:
    """Return the text with every block rewritten.

    Raises:
        UserError: a block has an unknown name, or a record is malformed.
    """

    def replace(match: re.Match) -> str:
        begin, name, _, end = match.groups()
        if name not in BLOCKS:
            raise UserError(f"block {name!r} is unknown: it may be one of {', '.join(BLOCKS)}")
        return begin + BLOCKS[name](results) + end

    return BLOCK.sub(replace, text)


def main(args: argparse.Namespace) -> None:
    """Fill the pages from the results and draw the pictures."""
    from scripts.reporting.pictures import PICTURES  # imports matplotlib

    results = Results(Path(args.results_dir))
    if not results.folder.is_dir():
        raise UserError(f"--results_dir {args.results_dir} is not a folder: give the folder of the records")
    pages = args.pages or sorted(path for pattern in PAGES for path in Path().glob(pattern))
    texts = {page: check_input(page, "page").read_text() for page in pages}
    filled = {page: fill(text, results) for page, text in texts.items()}
    for name, draw in PICTURES.items():
        if draw(results, results.folder / name):
            print(f"wrote {results.folder / name}")
    for page, text in filled.items():
        if text == texts[page]:
            print(f"{page} is up to date")
            continue
        with atomic_write(page) as temporary:
            temporary.write_text(text)
        print(f"wrote {page}")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
