"""Write a CSV with one row per prunable layer, all at sparsity 1.0, for editing by hand.

The column `sparsity` is the fraction of weights KEPT: 1.0 prunes nothing, 0.0 prunes the whole layer. The
columns shape, parameters and macs help you decide; prune.py ignores them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import MobileNetV2
from models.mobilenetv2 import OUTPUT_STRIDES
from models.statistics import model_statistics
from utils.checkpoints.weights import Weights
from utils.common import cli, errors, runtime
from utils.data.datasets import DEFAULT_IMAGE_SIZE
from utils.open_weights import open_weights
from utils.pruning.sparsity_dict import MEANING, describe_layers, write_sparsity_dict


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--o", default="sparsity_dict.csv", help="CSV to write")
    cli.add_force_argument(parser)
    parser.add_argument("--weights", help="weights file of the model (default: the flags below describe it)")
    model = parser.add_argument_group("model, without --weights")
    model.add_argument("--num_classes", type=cli.positive_int, help="(default: 10)")
    model.add_argument("--width_mult", type=cli.width_mult, help="(default: 1.0)")
    model.add_argument("--output_stride", type=int, choices=sorted(OUTPUT_STRIDES), help="(default: 16)")
    model.add_argument("--image_size", type=cli.image_size, help="image side in pixels (default: 32)")
    return parser


def described_model(args: argparse.Namespace) -> Weights:
    """Return the model of --weights, or the one that the other flags describe.

    Raises:
        UserError: both are given.
    """
    names = ("num_classes", "width_mult", "output_stride", "image_size")
    described = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not args.weights:
        image_size = described.pop("image_size", DEFAULT_IMAGE_SIZE)
        return Weights(MobileNetV2(**described), image_size=image_size)
    if described:
        raise errors.UserError(f"--{next(iter(described))} does not go with --weights: give only one of them")
    return open_weights(args.weights)


def main(args: argparse.Namespace) -> None:
    """Write the template."""
    runtime.check_outputs(args, "o")
    weights = described_model(args)
    layers = model_statistics(weights.model, weights.image_size).layers
    write_sparsity_dict(args.o, {layer.name: 1.0 for layer in layers}, describe_layers(layers))
    print(f"wrote {args.o}: {len(layers)} layers")
    print(MEANING)


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
