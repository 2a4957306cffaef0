"""Choose how much of each layer to keep so that the whole model reaches a target density.

Writes the CSV that prune.py reads and that you can edit; its `sparsity` is the fraction of a layer's weights
KEPT. --target is the density of the whole model, as evaluate.py prints it: the fraction of ALL parameters
(weights, biases and batch norms) that are not zero.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.statistics import model_statistics
from utils.common import cli, errors, runtime
from utils.common.errors import UserError
from utils.open_weights import open_weights
from utils.pruning.allocation import (
    DEFAULT_METHOD,
    GROUPS,
    METHODS,
    allocate,
    layer_limits,
    loss_curves,
    shortest_keep_ratio,
    weight_budget,
)
from utils.pruning.pruner import FineGrainedPruner
from utils.pruning.scanning_log import read_measurements
from utils.pruning.sparsity_dict import MEANING, describe_layers, write_sparsity_dict
from utils.pruning.tables import format_density, format_layers


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--weights", required=True, help="weights file of the model to prune")
    parser.add_argument(
        "--target",
        type=cli.fraction,
        required=True,
        metavar="DENSITY",
        help="fraction of ALL parameters that should be nonzero, such as 0.271",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=DEFAULT_METHOD,
        help="uniform: the same fraction everywhere; erk: Erdős–Rényi-Kernel; global: one threshold for "
        "the magnitudes of all layers (add --spare classifier, which has no batch norm); "
        "lamp: one threshold for layer-adaptive magnitudes; sensitivity: the least loss that a scan predicts",
    )
    parser.add_argument(
        "--scanning_log",
        metavar="CSV",
        help="finished log of scripts/sensitivity_scan.py, for --method sensitivity",
    )
    parser.add_argument("--o", default="sparsity_dict.csv", help="CSV to write")
    cli.add_force_argument(parser)
    limits = parser.add_argument_group(
        "limits", f"LAYER is a layer's name, such as features.18.0, or one of {', '.join(GROUPS)}"
    )
    limits.add_argument(
        "--spare", nargs="+", action="extend", default=[], metavar="LAYER", help="layers to leave unpruned"
    )
    for flag, what in (("--keep_at_least", "smallest"), ("--keep_at_most", "largest")):
        limits.add_argument(
            flag,
            nargs="+",
            action="extend",
            type=layer_fraction,
            default=[],
            metavar="LAYER=FRACTION",
            help=f"{what} fraction of the layer's weights that may be KEPT",
        )
    limits.add_argument(
        "--keep_per_channel",
        type=cli.non_negative_int,
        default=1,
        metavar="N",
        help="every layer keeps at least N weights per output channel on average; 0 allows empty layers",
    )
    return parser


def layer_fraction(text: str) -> tuple[str, float]:
    """Parse LAYER=FRACTION into a pair."""
    name, separator, fraction = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"{text!r} must be LAYER=FRACTION, such as depthwise=0.5")
    return name, cli.fraction(fraction)


def main(args: argparse.Namespace) -> None:
    """Allocate the budget and write the CSV."""
    runtime.check_outputs(args, "o")
    if (args.method == "sensitivity") != (args.scanning_log is not None):
        raise UserError(
            "--method sensitivity and --scanning_log go together: give both; "
            "scripts/sensitivity_scan.py writes the log"
        )
    weights = open_weights(args.weights)
    model = weights.model
    statistics = model_statistics(model, weights.image_size)
    layers = statistics.layers
    descriptions = describe_layers(layers)
    curves = None
    if args.scanning_log is not None:
        curves = loss_curves(model, layers, read_measurements(args.scanning_log, descriptions))
    limits = layer_limits(
        layers,
        spare=args.spare,
        keep_at_least=args.keep_at_least,
        keep_at_most=args.keep_at_most,
        keep_per_channel=args.keep_per_channel,
        curves=curves,
    )
    budget = weight_budget(args.target, statistics, limits)
    kept = allocate(args.method, model, layers, limits, budget, curves)
    keep_ratios = {layer.name: shortest_keep_ratio(kept[layer.name], layer.parameters) for layer in layers}
    write_sparsity_dict(args.o, keep_ratios, descriptions)
    # The printed numbers are counted on the pruned model, as prune.py will count them.
    pruner = FineGrainedPruner(model, keep_ratios)
    pruner.apply()
    print(format_layers(pruner), end="\n\n")
    print(format_density(model_statistics(model, weights.image_size)))
    print(f"wrote {args.o}: {len(keep_ratios)} layers by {args.method}")
    print(MEANING)


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
