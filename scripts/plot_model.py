"""Plot a model file: density and size of each layer, weight histograms, the bytes of a packed file.

Takes every file that evaluate.py takes. With --before, the histograms compare the weights with those of
another file of the same architecture, such as the model before pruning; if only one of the two has its
batch norms folded, they are folded in the other as well.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.common import cli, errors, files, runtime
from utils.common.errors import UserError, printable
from utils.open_model import ModelFile, open_model
from utils.packing.format import is_packed
from utils.packing.pack import format_sizes, packed_sizes
from utils.plots import has_batch_norms, layer_weights, plot_model


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--weights", required=True, help="file of any kind that this project writes")
    parser.add_argument("--before", help="file to compare the weights with, such as the dense weights")
    parser.add_argument("--o", default="model.png", help="PNG to write")
    cli.add_force_argument(parser)
    return parser


def check_same_architecture(before: ModelFile, after: ModelFile) -> None:
    """Make sure that two models can be compared layer by layer.

    Raises:
        UserError: a layer has another shape.
    """
    shapes = {name: weight.shape for name, weight in layer_weights(after).items()}
    for name, weight in layer_weights(before).items():
        if weight.shape != shapes[name]:
            raise UserError(
                f"--before {before.path} is of another architecture: {name} is {weight.shape} there "
                f"and {shapes[name]} in {after.path}"
            )


def main(args: argparse.Namespace) -> None:
    """Open the files, draw, print where the bytes of a packed file go."""
    runtime.check_outputs(args, "o")
    after = open_model(args.weights)
    compared = {"weights": after}
    if args.before is not None:
        compared = {"before": open_model(args.before), "after": after}
        check_same_architecture(*compared.values())
    fold = not all(map(has_batch_norms, compared.values()))
    histograms = {name: layer_weights(file, fold) for name, file in compared.items()}
    sizes = packed_sizes(after.path) if is_packed(after.path) else None
    title = (
        f"{printable(after.path.name)}: {after.metadata.variant}, "
        f"density {100 * after.metadata.density:.2f} %, {files.file_size_mb(after.path):.2f} MB"
    )
    histogram_of = "weight, batch norm folded in" if fold else "weight"
    plot_model(args.o, title, layer_weights(after), sizes, histograms, histogram_of)
    if sizes is not None:
        print(format_sizes(sizes))
    print(f"wrote {args.o}")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
