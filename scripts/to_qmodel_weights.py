"""Convert float weights, dense or pruned, to a qmodel: the same weights in a model that can be quantized.

A qmodel is still float and gives the same logits. PTQ and QAT take float weights too.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import MobileNetV2Quantization
from models.statistics import model_statistics
from utils.checkpoints.weights import add_output_stride_argument, save_weights
from utils.common import cli, errors, files, runtime
from utils.open_weights import open_weights


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--weights", required=True, help="weights file, dense or pruned")
    parser.add_argument("--output", default="qmodel.pth", help="qmodel file to write")
    cli.add_force_argument(parser)
    add_output_stride_argument(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Convert and print a summary."""
    runtime.check_outputs(args, "output")
    weights = open_weights(args.weights, output_stride=args.output_stride)
    qmodel = replace(weights, model=MobileNetV2Quantization.from_float(weights.model), kind="qmodel")
    save_weights(args.output, qmodel, args)
    statistics = model_statistics(qmodel.model, qmodel.image_size)
    print(
        f"wrote {args.output} ({files.file_size_mb(args.output):.2f} MB), "
        f"{statistics.parameters} parameters, density {100 * statistics.density:.2f} %"
    )


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
