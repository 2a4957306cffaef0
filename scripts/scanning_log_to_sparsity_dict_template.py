"""Turn a finished sensitivity scan into a sparsity dict with the recommended sparsity of each layer.

The result is a starting point: the scan prunes one layer at a time, and pruning all of them together costs
more accuracy. Edit it by hand, then pass it to prune.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.common import cli, errors, runtime
from utils.pruning.scanning_log import read_scan
from utils.pruning.sparsity_dict import MEANING, write_sparsity_dict


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--f", default="scanning_log.csv", help="log of scripts/sensitivity_scan.py")
    parser.add_argument("--o", default="sparsity_dict.csv", help="CSV to write")
    cli.add_force_argument(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the sparsity dict that the log recommends."""
    runtime.check_outputs(args, "o")
    _, keep_ratios, descriptions = read_scan(args.f)
    write_sparsity_dict(args.o, keep_ratios, descriptions)
    pruned = sum(keep_ratio < 1 for keep_ratio in keep_ratios.values())
    print(f"wrote {args.o}: {pruned} of {len(keep_ratios)} layers will be pruned")
    print(MEANING)


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
