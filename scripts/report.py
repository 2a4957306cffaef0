"""Write the numbers under results/ into the README, between markers; the same files, the same text.

A block begins with `<!-- begin NAME ARGUMENT -->` and ends with `<!-- end NAME -->`; what stands
between the two is replaced by what BLOCKS makes of the results.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from utils import cli, errors
from utils.errors import UserError
from utils.files import atomic_write, check_input

BLOCK = re.compile(r"(<!-- begin (\w+)(?: (\S+))? -->\n).*?(<!-- end \2 -->)", re.DOTALL)
LAST_LINES = 9


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--results_dir", default="results", help="where the result files are")
    parser.add_argument("--readme", default="README.md", help="file to write into")
    return parser


class Results:
    """The result files, read when a block asks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> dict[str, Any]:
        """One record, as `--record` writes it.

        Raises:
            UserError: there is no such file, or it is no record.
        """
        path = check_input(self.folder / f"{name}.json", "result file")
        try:
            record = json.loads(path.read_text())
            return {key: record[key] for key in ("results", "versions", "cpu", "threads", "arguments")}
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is not a record of --record: write it again") from error


def machine(record: dict[str, Any]) -> str:
    """Where and with what a record was measured."""
    return (
        f"{record['cpu']}, {record['threads']} threads, torch {record['versions']['torch']}, "
        f"torchvision {record['versions']['torchvision']}, seed {record['arguments']['seed']}"
    )


def step(results: Results, argument: str) -> str:
    """`RECORD:SCRIPT`: the command of a step of the chain, its time, its last lines."""
    name, _, script = argument.partition(":")
    record = results.read(name)
    found = next((s for s in record["results"]["steps"] if s["script"] == script), None)
    if found is None:
        raise UserError(f"{results.folder / name}.json has no step {script}: write it again")
    printed = [line for line in found["printed"] if line.strip()][-LAST_LINES:]
    return "\n".join(["```", f"$ {found['command']}", "…", *printed, "```", f"{found['seconds']:.0f} s.", ""])


def chain_table(results: Results, argument: str) -> str:
    """`RECORD`: the closing table of the chain, each variant against float."""
    record = results.read(argument)
    rows = record["results"]["variants"]
    base = rows[0]
    lines = [
        "| variant | accuracy % | points | size MB | density | latency ms | speed-up |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        points = row["accuracy_pct"] - base["accuracy_pct"]
        lines.append(
            f"| {row['variant']} | {row['accuracy_pct']:.2f} | {points:+.2f} "
            f"| {row['size_mb']:.2f} | {row['density']:.3f} | {row['latency_ms']:.2f} "
            f"| {base['latency_ms'] / row['latency_ms']:.2f}× |"
        )
    seconds = record["results"]["seconds"]
    return "\n".join([*lines, "", f"The whole chain took {seconds} s on {machine(record)}.", ""])


BLOCKS: dict[str, Callable[[Results, str], str]] = {"step": step, "chain_table": chain_table}


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
    """Fill the README from the results."""
    readme = check_input(args.readme, "README")
    text = readme.read_text()
    filled = fill(text, Results(Path(args.results_dir)))
    if filled == text:
        print(f"{readme} is up to date")
        return
    with atomic_write(readme) as temporary:
        temporary.write_text(filled)
    print(f"wrote {readme}")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
