"""Pack a model into the smallest file that gives it back exactly.

Takes weights (dense, pruned, qmodel) and int8 TorchScript files. Every script that takes weights takes
the packed file in their place. float32 and int8 come back bit for bit; float16 is rounded once.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from utils.common import cli, errors
from utils.common.files import BYTES_PER_MB, atomic_write, check_output, file_size_mb
from utils.common.tables import format_table
from utils.packing.pack import DTYPES, KINDS, check_same, encode, open_source, packed_sizes


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--weights", required=True, help="weights (.pth) or an int8 TorchScript file (.pt)")
    parser.add_argument("--o", required=True, metavar="FILE", help="packed file to write")
    cli.add_force_argument(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="float16 halves float weights, rounding them; int8 takes a file that is int8 "
        "(default: the file's own)",
    )
    return parser


def describe(sizes: pd.DataFrame) -> str:
    """Where the bytes go, by kind."""
    by_kind = sizes.groupby("kind")["bytes"].sum()
    total = int(by_kind.sum())
    rows = [
        (kind, int(by_kind[kind]), f"{100 * by_kind[kind] / total:.2f}") for kind in KINDS if kind in by_kind
    ]
    return format_table(["in the file", "bytes", "%"], [*rows, ("all", total, "100.00")])


def main(args: argparse.Namespace) -> None:
    """Pack, open again, compare, and only then let the file stand."""
    check_output(args.o, force=args.force)
    source, dtype = open_source(args.weights, args.dtype)
    before = file_size_mb(args.weights)
    content = encode(source, dtype)
    with atomic_write(args.o) as temporary:
        temporary.write_bytes(content)
        found = check_same(temporary, source, dtype)
    print(describe(packed_sizes(args.o)))
    after = len(content) / BYTES_PER_MB
    print(f"checked: {found}")
    print(f"size {before:.3f} MB -> {after:.3f} MB, ratio {before / after:.2f}×")
    print(f"wrote {args.o} ({after:.3f} MB, {dtype})")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
